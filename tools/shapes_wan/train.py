"""Train the text encoder and the transformer together, by rectified flow on cached latents.

    python -m tools.shapes_wan.train cache --vae vae --out latents.pt --clips 100000
    python -m tools.shapes_wan.train fit --latents latents.pt --out run --minutes 7

`fit` writes `checkpoint.pt`: the averaged weights that `export.py` turns into a pipeline folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import diffusers.models.autoencoders.autoencoder_kl_wan as vae_module
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from tools.shapes.muon import Muon
from tools.shapes.vae_train import encode, use_one_frame_forms
from tools.shapes_wan import models
from tools.shapes_wan.clips import NUM_FRAMES
from tools.shapes_wan.loop import Loop
from tools.shapes_wan.table import TEXT_TOKENS, ClipTable, caption_tokens, choose_captions, draw_clips
from tools.shapes_wan.tokenizer import build_tokenizer
from tools.shapes_wan.vae_train import LATENT_CHANNELS, LATENT_SIDE

DROPOUT = 0.1  # share of captions replaced by the empty one, the usual negative prompt
EMA_DECAY = 0.999
# Frames are alike, so that much of a clip shows through the noise: levels are shifted up as Wan does it.
SIGMA_SHIFT = 3.0
DECAY_FROM = 0.3  # share of the time at full learning rate


@torch.no_grad()
def cache(args: argparse.Namespace) -> None:
    """Draw clips and store their normalised latents, float16 [N, C, F, H, W], and which words each shows [N]."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    use_one_frame_forms(vae_module, "Wan")
    vae = AutoencoderKLWan.from_pretrained(args.vae).to(device)
    mean, std = (torch.tensor(vae.config[k], device=device).view(-1, 1, 1) for k in ("latents_mean", "latents_std"))
    forward = torch.compile(encode, dynamic=False) if args.compile else encode
    table = ClipTable(device)
    latents = torch.empty(args.clips, LATENT_CHANNELS, NUM_FRAMES, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
    words = torch.empty(args.clips, dtype=torch.long)
    start = time.time()
    for i in range(0, args.clips, args.batch_size):
        chosen, backgrounds, things = table.sample(args.batch_size)
        pixels = draw_clips(backgrounds, things).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            out = forward(vae, pixels).float()
        rows = slice(i, min(i + args.batch_size, args.clips))
        count = rows.stop - i
        out = ((out - mean) / std).unflatten(0, (-1, NUM_FRAMES)).transpose(1, 2)
        latents[rows], words[rows] = out[:count].half().cpu(), chosen[:count].cpu()
    torch.save({"latents": latents, "words": words}, args.out)
    print(f"{args.clips} clips in {time.time() - start:.0f} s", flush=True)


class Batches:
    """Endless random batches, all held on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        stored = torch.load(path, map_location=device)
        self.latents, self.words = stored["latents"], stored["words"]
        self.tokenizer = build_tokenizer()
        self.ids, self.lengths = caption_tokens(ClipTable(device).words, self.tokenizer, device)
        self.empty = torch.zeros(TEXT_TOKENS, dtype=torch.long, device=device)
        self.empty[0] = self.tokenizer.eos_token_id

    def next(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents float32 [B, C, F, H, W], ids [B, L], lengths [B]; some captions are the empty one."""
        device = self.latents.device
        chosen = torch.randint(len(self.latents), (size,), device=device)
        ids, lengths = choose_captions(self.ids, self.lengths, self.words[chosen])
        dropped = torch.rand(size, device=device) < DROPOUT
        return (
            self.latents[chosen].float(),
            torch.where(dropped[:, None], self.empty, ids),
            lengths.masked_fill(dropped, 1),
        )


def sample_sigma(count: int, device: torch.device) -> Tensor:
    """Noise levels [count] in 0..1: mostly logit-normal, a quarter uniform, all shifted to high noise."""
    u = torch.sigmoid(torch.randn(count, device=device))
    u = torch.where(torch.rand(count, device=device) < 0.25, torch.rand(count, device=device), u)
    return SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)


def _optimizers(model: nn.Module, rates: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for matrices within blocks, AdamW for all else."""
    inner, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and ("block." in name or "blocks." in name) and "bias" not in name
        (inner if matrix else rest).append(p)
    on_gpu = rates[0].is_cuda
    return [
        Muon(inner, lr=rates[0], match_adam=True, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=on_gpu),
    ]


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    batches = Batches(args.latents, device)
    model = nn.ModuleDict(
        {
            "text_encoder": models.build_text_encoder(batches.tokenizer),
            "transformer": models.build_transformer(args.layers, args.heads),
        }
    ).to(device)
    if args.start:
        model.load_state_dict(torch.load(args.start, map_location=device)["average"])
    text_encoder, transformer = model["text_encoder"], model["transformer"]
    buckets = models.position_buckets(text_encoder, TEXT_TOKENS)
    tables = models.rotary_tables(transformer)
    block_forward = torch.compile(models.block_forward, dynamic=False) if args.compile else models.block_forward

    def loss() -> Tensor:
        clean, ids, lengths = batches.next(args.batch_size)
        noise, sigma = torch.randn_like(clean), sample_sigma(len(clean), device)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        with torch.autocast(device.type, torch.bfloat16):
            text = models.encode_text(text_encoder, ids, lengths, buckets)
            out = models.predict(transformer, noisy, text, lengths, sigma, *tables, block_fn=block_forward)
        return (out.float() - (noise - clean)).square().mean()

    def save() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        stored = {"average": loop.average.state_dict(), "layers": args.layers, "heads": args.heads, "step": loop.step}
        torch.save(stored, args.out / "checkpoint.pt")

    rates = [torch.zeros((), device=device) for _ in range(2)]
    loop = Loop(
        model,
        loss,
        _optimizers(model, rates),
        rates,
        (args.lr_muon, args.lr),
        schedule=lambda progress: min(1.0, max(0.01, (1 - progress) / (1 - DECAY_FROM))),
        ema_decay=EMA_DECAY,
        num_warmup=200,
    )
    loop.run(args.minutes, args.batch_size, capture=args.capture, on_progress=save)
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    caching, fitting = commands.add_parser("cache"), commands.add_parser("fit")
    for sub in (caching, fitting):
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--no-compile", dest="compile", action="store_false")
    caching.add_argument("--vae", type=Path, required=True)
    caching.add_argument("--clips", type=int, default=100000)
    caching.add_argument("--batch-size", type=int, default=64, help="clips")
    fitting.add_argument("--latents", type=Path, required=True)
    fitting.add_argument("--minutes", type=float, default=7)
    fitting.add_argument("--batch-size", type=int, default=512, help="clips")
    fitting.add_argument("--lr", type=float, default=1.5e-3, help="AdamW: embeddings, norms, biases, modulation")
    fitting.add_argument("--lr-muon", type=float, default=2e-3, help="Muon: matrices within the blocks")
    fitting.add_argument("--layers", type=int, default=5)
    fitting.add_argument("--heads", type=int, default=6)
    fitting.add_argument("--start", type=Path, help="checkpoint to go on from, of the same size")
    fitting.add_argument("--no-capture", dest="capture", action="store_false", help="no CUDA graph of the step")
    args = parser.parse_args()
    (cache if args.command == "cache" else fit)(args)


if __name__ == "__main__":
    main()
