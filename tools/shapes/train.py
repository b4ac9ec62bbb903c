"""Train the text encoder and the transformer together, by rectified flow on cached latents.

    python -m tools.shapes.train cache --vae vae --out latents.pt --scenes 400000
    python -m tools.shapes.train fit --latents latents.pt --out run --minutes 5

`fit` writes `checkpoint.pt` every few minutes: the averaged weights that `export.py` turns into a
pipeline folder. Learning rates follow the wall clock, so a run always
ends decayed after the minutes it was given, however fast the machine is.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from tools.shapes import models, vae_train
from tools.shapes.capture import captured
from tools.shapes.muon import Muon
from tools.shapes.table import CAPTION_TOKENS, NUM_LABELS, SceneTable, draw, layout, sample_table, thinned
from tools.shapes.tokenizer import PREFIX, PREFIX_TOKENS, SUFFIX, build_tokenizer

DROPOUT = 0.1  # share of captions replaced by " ", the usual negative prompt
NUM_CAPTIONS = 4  # captions kept of each scene
EMA_DECAY = 0.999
SIGMA_SHIFT = 3.0


# ---------------------------------------------------------------- data


def cache(args: argparse.Namespace) -> None:
    """Draw scenes and store their normalised latents, float16 [N, 16, 16, 16], with `things` and captions of each."""
    table = thinned(sample_table(args.scenes, args.seed, NUM_CAPTIONS), args.keep_single)
    latents = encode_scenes(table, args.vae, torch.device(args.device), args.batch_size, args.compile)
    captions = {"ids": table.caption_ids, "lengths": table.caption_lengths}
    torch.save({"latents": latents.cpu(), "things": table.things, **captions}, args.out)


@torch.no_grad()
def encode_scenes(table: SceneTable, folder: Path, device: torch.device, batch_size: int, compiled: bool) -> Tensor:
    """Normalised latents, float16 [N, 16, 16, 16] on the device, of all scenes by the autoencoder in a folder."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder).to(device)
    vae_train.use_one_frame_forms()
    mean, std = (torch.tensor(vae.config[k], device=device).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
    encode = torch.compile(vae_train.encode, dynamic=False) if compiled else vae_train.encode
    latents = torch.empty(len(table), 16, 16, 16, dtype=torch.float16, device=device)
    start, shown = time.time(), 0
    for i in range(0, len(table), batch_size):
        rows = (column[i : i + batch_size].to(device) for column in (table.backgrounds, table.things))
        with torch.autocast(device.type, torch.bfloat16):
            out = encode(vae, draw(*rows).contiguous(memory_format=torch.channels_last)).float()
        latents[i : i + len(out)] = (out - mean) / std
        if time.time() - start > 10 * shown:
            print(f"{i} of {len(table)}, {time.time() - start:.0f} s", flush=True)
            shown += 1
    return latents


class Batches:
    """Endless random batches of (latents, padded caption ids, caption lengths, things), all held on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        stored = torch.load(path, map_location=device)
        self.latents, self.ids, self.lengths = stored["latents"], stored["ids"], stored["lengths"]
        self.things = stored["things"]
        self.device = device
        self.tokenizer = build_tokenizer()
        self.prefix = torch.tensor(self.tokenizer(PREFIX).input_ids, device=device)
        empty = self.tokenizer(PREFIX + " " + SUFFIX).input_ids[PREFIX_TOKENS:]
        self.empty = torch.zeros(CAPTION_TOKENS, dtype=self.ids.dtype, device=device)
        self.empty[: len(empty)] = torch.tensor(empty)
        self.empty_length = len(empty)

    def next(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents float32 [B, 16, 16, 16], ids [B, L], lengths [B], things [B, 3, 5]; some captions are empty."""
        device = self.device
        chosen = torch.randint(len(self.latents), (size,), device=device)
        said = torch.randint(self.ids.shape[1], (size,), device=device)
        dropped = torch.rand(size, device=device) < DROPOUT
        ids = torch.where(dropped[:, None], self.empty, self.ids[chosen, said])
        lengths = self.lengths[chosen, said].masked_fill(dropped, self.empty_length)
        return self.latents[chosen].float(), ids.long(), lengths.long(), self.things[chosen]


# ---------------------------------------------------------------- training


def sample_sigma(count: int, device: torch.device) -> Tensor:
    """Noise levels [count] in 0..1: mostly logit-normal, a quarter uniform, all shifted to high noise."""
    u = torch.sigmoid(torch.randn(count, device=device))
    u = torch.where(torch.rand(count, device=device) < 0.25, torch.rand(count, device=device), u)
    return SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)


class Trainer:
    """Model, its average, optimizers, and the compiled forward passes."""

    def __init__(self, args: argparse.Namespace, batches: Batches) -> None:
        self.args, self.batches, self.device = args, batches, batches.device
        self.model = self.build().to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        transformer = self.model["transformer"]
        self.layout_head = nn.Linear(transformer.inner_dim, NUM_LABELS).to(self.device)
        self.layout_block = transformer.transformer_blocks[2 * args.layers // 3]
        self.trained = [p for p in [*self.model.parameters(), *self.layout_head.parameters()] if p.requires_grad]
        self.rates = [torch.zeros((), device=self.device) for _ in range(2)]
        self.optimizers = self._optimizers()
        self.block = torch.compile(models.block_forward, dynamic=False) if args.compile else models.block_forward
        self.prepare_tables()
        self.step, self.seen = 0, 0

    def build(self) -> nn.ModuleDict:
        """The models to train, with random weights; what does not move needs no gradient."""
        text_encoder = models.build_text_encoder(self.batches.tokenizer)
        text_encoder.model.visual.requires_grad_(False)
        transformer = models.build_transformer(self.args.layers, self.args.heads)
        return nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})

    def prepare_tables(self) -> None:
        """Rotary tables of both models."""
        self.text_tables = models.text_tables(self.model["text_encoder"], PREFIX_TOKENS + CAPTION_TOKENS)
        self.image_tables = models.image_tables(self.model["transformer"], CAPTION_TOKENS)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for matrices within blocks and layers, AdamW for all else. Rates are tensors: a replay reads them."""
        inner, rest = [], list(self.layout_head.parameters())
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                matrix = p.ndim == 2 and (".layers." in name or "blocks." in name) and "_mod." not in name
                (inner if matrix else rest).append(p)
        on_gpu = self.device.type == "cuda"
        return [
            Muon(inner, lr=self.rates[0], match_adam=True, weight_decay=0.02),
            torch.optim.AdamW(
                rest, lr=self.rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=on_gpu
            ),
        ]

    def loss(self, latents: Tensor, ids: Tensor, lengths: Tensor, things: Tensor) -> Tensor:
        """Mean squared error of the velocity on one batch, and how well a layer on the way tells what stands where.

        The second is cheap supervision in the manner of REPA (Yu et al., 2024), with labels in place of features:
        the squared error alone hardly minds which shape a small thing has.
        """
        clean = models.pack(latents)
        noise = torch.randn_like(clean)
        sigma = sample_sigma(len(clean), self.device)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        mask = torch.zeros(len(ids), 1, 1, ids.shape[1] + clean.shape[1], device=self.device)
        unused = torch.arange(ids.shape[1], device=self.device) >= lengths[:, None]
        mask[:, 0, 0, : ids.shape[1]] = unused.float() * -1e9
        with torch.autocast(self.device.type, torch.bfloat16):
            text = models.encode_text(self.model["text_encoder"], self.batches.prefix, ids, *self.text_tables)
            out = models.predict(
                self.model["transformer"], noisy, text, mask, sigma, *self.image_tables, block_fn=self._tapped_block
            )
        velocity_loss = (out.float() - (noise - clean)).square().mean()
        self.velocity_loss = velocity_loss.detach()
        return velocity_loss + self.layout_loss(layout(things, models.TOKEN_SIDE).flatten(2).mT)

    def layout_loss(self, labels: Tensor) -> Tensor:
        """Weighted cross entropy of what the tapped tokens say of their labels [B, I, 13]."""
        with torch.autocast(self.device.type, torch.bfloat16):
            seen = self.layout_head(F.layer_norm(self.tapped, self.tapped.shape[-1:]))
        del self.tapped  # it would keep the graph of this step's gradients
        return self.args.layout_weight * F.binary_cross_entropy_with_logits(seen.float(), labels)

    def _tapped_block(self, block: nn.Module, *inputs: Tensor | bool) -> tuple[Tensor, Tensor]:
        """A block; of the one that the layout is read from, the image tokens are kept."""
        image, text = self.block(block, *inputs)
        if block is self.layout_block:
            self.tapped = image
        return image, text

    def update(self) -> Tensor:
        """One step of the optimizers on a whole batch. Returns the loss of the velocity."""
        loss = self.loss(*self.batches.next(self.args.batch_size))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.velocity_loss

    def train_step(self, progress: float) -> Tensor:
        """Set the rates for `progress`, the share of the time used, 0..1, and step. Returns the loss."""
        share = min(1.0, (self.step + 1) / 150) * min(1.0, max(0.01, (1 - progress) / (1 - self.args.decay_from)))
        for rate, peak in zip(self.rates, (self.args.lr_muon, self.args.lr), strict=True):
            rate.fill_(peak * share)
        loss = self.update()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step, self.seen = self.step + 1, self.seen + self.args.batch_size
        return loss

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "step": self.step,
            "seen": self.seen,
            "layers": self.args.layers,
            "heads": self.args.heads,
        }

    def start_from(self, folder: Path) -> None:
        """Take the weights of an exported pipeline; the optimizers start anew.

        Blocks beyond those of the folder keep their start, which changes nothing, so that a model can grow deeper.
        """
        for name, model in self.model.items():
            stored = type(model).from_pretrained(folder, subfolder=name).state_dict()
            merged = model.state_dict() | stored
            model.load_state_dict(merged)
            self.average[name].load_state_dict(merged)

    def save(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        part = self.args.out / "checkpoint.part"
        torch.save(self.state(), part)
        part.replace(self.args.out / "checkpoint.pt")


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(args, Batches(args.latents, torch.device(args.device)))
    if args.start:
        trainer.start_from(args.start)
    if trainer.device.type == "cuda" and args.capture:
        trainer.update = captured(trainer.update)
    run(trainer, args)


def run(trainer: Trainer, args: argparse.Namespace) -> None:
    """Train for `args.minutes`, which count from here; write the checkpoint now and then and at the end."""
    start = saved = shown = time.time()
    losses: list[Tensor] = []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        losses.append(trainer.train_step(progress))
        if trainer.step % 100 == 0:
            mean, now = float(torch.stack(losses).mean()), time.time()
            speed = 100 * args.batch_size / (now - shown)
            print(
                f"step {trainer.step} seen {trainer.seen} t {now - start:.0f}s loss {mean:.4f} {speed:.0f} samples/s",
                flush=True,
            )
            losses, shown = [], now
        if time.time() - saved > 180:
            trainer.save()
            saved = time.time()
    trainer.save()
    print(f"done: {trainer.step} steps, {trainer.seen} samples, {(time.time() - start) / 60:.1f} minutes", flush=True)


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """What `Trainer` and `run` read, without the sizes of the models."""
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--layout-weight", type=float, default=0.3, help="of the loss of colours and shapes per token")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW: embeddings, norms, biases, modulation")
    parser.add_argument("--lr-muon", type=float, default=2e-3, help="Muon: matrices within the blocks")
    parser.add_argument("--decay-from", type=float, default=0.3, help="share of the time at full learning rate")
    parser.add_argument("--no-capture", dest="capture", action="store_false", help="no CUDA graph of the step")


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
    caching.add_argument("--scenes", type=int, default=400000)
    caching.add_argument("--batch-size", type=int, default=256)
    caching.add_argument("--keep-single", type=float, default=1.0, help="share kept of the scenes with one object")
    fitting.add_argument("--latents", type=Path, required=True)
    fitting.add_argument("--layers", type=int, default=6)
    fitting.add_argument("--heads", type=int, default=5)
    add_fit_arguments(fitting)
    fitting.add_argument("--start", type=Path, help="pipeline folder to go on from, as wide and at most as deep")
    args = parser.parse_args()
    (cache if args.command == "cache" else fit)(args)


if __name__ == "__main__":
    main()
