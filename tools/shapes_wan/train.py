"""Train the miniature: the autoencoder, then text encoder and transformer together by rectified flow on its latents.

    python -m tools.shapes_wan.train --out work --minutes 8

Writes `vae`, then `checkpoint.pt` with averaged weights, every minute and at the end; `export.py` turns both into a
pipeline folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from tools.shapes.muon import Muon
from tools.shapes_wan import models
from tools.shapes_wan.clips import NUM_FRAMES
from tools.shapes_wan.loop import Loop
from tools.shapes_wan.table import TEXT_TOKENS, ClipTable, caption_tokens, choose_captions, draw_clips
from tools.shapes_wan.tokenizer import build_tokenizer
from tools.shapes_wan.vae_train import LATENT_CHANNELS, LATENT_SIDE, encode, measure, single_frames, train_vae

DROPOUT = 0.1  # share of captions replaced by the empty one, the usual negative prompt
EMA_DECAY = 0.999
# Frames are alike, so that much of a clip shows through the noise: levels are shifted up as Wan does it.
SIGMA_SHIFT = 3.0
DECAY_FROM = 0.3  # share of the time at full learning rate
VAE_SHARE = 0.25  # of the time


@single_frames()
@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, count: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Normalised latents of random clips, float16 [N, C, F, H, W], and which words each shows [N]."""
    device = vae.device
    mean, std = (torch.tensor(vae.config[k], device=device).view(-1, 1, 1) for k in ("latents_mean", "latents_std"))
    table = ClipTable(device)
    shape = (count, LATENT_CHANNELS, NUM_FRAMES, LATENT_SIDE, LATENT_SIDE)
    latents = torch.empty(shape, dtype=torch.float16, device=device)
    words = torch.empty(count, dtype=torch.long, device=device)
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        chosen, backgrounds, things = table.sample(rows.stop - start)
        with torch.autocast(device.type, torch.bfloat16):
            out = encode(vae, draw_clips(backgrounds, things).flatten(0, 1)).float()
        latents[rows] = ((out - mean) / std).unflatten(0, (-1, NUM_FRAMES)).transpose(1, 2).half()
        words[rows] = chosen
    return latents, words


class Batches:
    """Endless random batches, all held on the device."""

    def __init__(self, latents: Tensor, words: Tensor) -> None:
        self.latents, self.words = latents, words
        self.tokenizer = build_tokenizer()
        self.ids, self.lengths = caption_tokens(ClipTable(latents.device).words, self.tokenizer, latents.device)
        self.empty = torch.zeros(TEXT_TOKENS, dtype=torch.long, device=latents.device)
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


def build_parts(batches: Batches, layers: int, heads: int) -> nn.ModuleDict:
    """Text encoder and transformer with random weights, on the device of the batches."""
    parts = {
        "text_encoder": models.build_text_encoder(batches.tokenizer),
        "transformer": models.build_transformer(layers, heads),
    }
    return nn.ModuleDict(parts).to(batches.latents.device)


def velocity_loss(parts: nn.ModuleDict, batches: Batches, batch_size: int, compiled: bool) -> Callable[[], Tensor]:
    """A function that gives the mean squared error of the velocity on a new batch."""
    text_encoder, transformer, device = parts["text_encoder"], parts["transformer"], batches.latents.device
    buckets = models.position_buckets(text_encoder, TEXT_TOKENS)
    tables = models.rotary_tables(transformer)
    block_forward = torch.compile(models.block_forward, dynamic=False) if compiled else models.block_forward

    def loss() -> Tensor:
        clean, ids, lengths = batches.next(batch_size)
        noise, sigma = torch.randn_like(clean), sample_sigma(batch_size, device)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        with torch.autocast(device.type, torch.bfloat16):
            text = models.encode_text(text_encoder, ids, lengths, buckets)
            out = models.predict(transformer, noisy, text, lengths, sigma, *tables, block_fn=block_forward)
        return (out.float() - (noise - clean)).square().mean()

    return loss


def _optimizers(parts: nn.ModuleDict, rates: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for matrices within blocks, AdamW for all else."""
    inner, rest = [], []
    for name, p in parts.named_parameters():
        matrix = p.ndim == 2 and ("block." in name or "blocks." in name) and "bias" not in name
        (inner if matrix else rest).append(p)
    on_gpu = rates[0].is_cuda
    return [
        Muon(inner, lr=rates[0], match_adam=True, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=on_gpu),
    ]


def fit(
    parts: nn.ModuleDict,
    batches: Batches,
    minutes: float,
    on_progress: Callable[[nn.ModuleDict], None],
    *,
    batch_size: int = 256,
    lr: float = 1.5e-3,
    lr_muon: float = 2e-3,
    compiled: bool = True,
    capture: bool = True,
) -> nn.ModuleDict:
    """Train `parts` for `minutes`. Returns the averaged weights, with which `on_progress` is called now and then."""
    rates = [torch.zeros((), device=batches.latents.device) for _ in range(2)]
    loop = Loop(
        parts,
        velocity_loss(parts, batches, batch_size, compiled),
        _optimizers(parts, rates),
        rates,
        (lr_muon, lr),
        schedule=lambda progress: min(1.0, max(0.01, (1 - progress) / (1 - DECAY_FROM))),
        ema_decay=EMA_DECAY,
        num_warmup=200,
    )
    loop.run(minutes, batch_size, capture=capture, on_progress=lambda: on_progress(loop.average))
    return loop.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="of both trainings together")
    parser.add_argument("--vae", type=Path, help="autoencoder folder, which is then not trained")
    parser.add_argument("--clips", type=int, default=60000, help="clips encoded once and shown again and again")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-capture", dest="capture", action="store_false", help="no CUDA graph of the steps")
    args = parser.parse_args()
    device, start = torch.device(args.device), time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True

    def save_vae(vae: AutoencoderKLWan) -> None:
        vae.save_pretrained(args.out / "vae")

    if args.vae:
        vae, vae_minutes = AutoencoderKLWan.from_pretrained(args.vae).to(device), 0.0
    else:
        vae_minutes = VAE_SHARE * args.minutes
        vae = train_vae(vae_minutes, device, save_vae, batch_size=args.batch_size, capture=args.capture)
        save_vae(vae)
        print([measure(vae, 20, noise) for noise in (0.0, 0.15)], flush=True)
    batches = Batches(*encode_clips(vae, args.clips))
    print(f"{args.clips} clips are encoded after {time.time() - start:.0f} s", flush=True)

    def save(average: nn.ModuleDict) -> None:
        stored = {"average": average.state_dict(), "layers": args.layers, "heads": args.heads}
        torch.save(stored, args.out / "checkpoint.pt")

    parts = build_parts(batches, args.layers, args.heads)
    options = {"batch_size": args.batch_size, "compiled": args.compile, "capture": args.capture}
    save(fit(parts, batches, args.minutes - vae_minutes, save, **options))


if __name__ == "__main__":
    main()
