"""Train the text encoder and the transformer together, by rectified flow on cached latents.

    python -m tools.shapes.train cache --vae vae --out latents.pt --scenes 60000
    python -m tools.shapes.train fit --latents latents.pt --out run --minutes 85

`fit` writes `checkpoint.pt` every few minutes: the averaged weights that `export.py` turns into a
pipeline folder, and all that `--resume` needs. Learning rates follow the wall clock, so a run always
ends decayed after the minutes it was given, however fast the machine is.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from tools.shapes import models, scenes, vae_train
from tools.shapes.tokenizer import PREFIX, PREFIX_TOKENS, SUFFIX, build_tokenizer

DROPOUT = 0.1  # share of captions replaced by " ", the usual negative prompt
LENGTHS = (20, 30)  # caption token counts that batches are padded to
EMA_DECAY = 0.998
SIGMA_SHIFT = 2.0


# ---------------------------------------------------------------- data


@torch.no_grad()
def cache(args: argparse.Namespace) -> None:
    """Draw scenes and store their normalised latents, float16 [N, 16, 16, 16]."""
    device = torch.device(args.device)
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae).to(device)
    vae_train.use_one_frame_forms()
    mean, std = (torch.tensor(vae.config[k], device=device).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
    drawn = draw(args.scenes, args.seed)
    encode = torch.compile(vae_train.encode, dynamic=False) if args.compile else vae_train.encode
    latents = torch.empty(len(drawn), 16, 16, 16, dtype=torch.float16)
    for i in range(0, len(drawn), 32):
        pictures = np.stack([scenes.render(s) for s in drawn[i : i + 32]])
        with torch.autocast(device.type, torch.bfloat16):
            out = encode(vae, vae_train.to_tensor(pictures, device)).float()
        latents[i : i + len(out)] = ((out - mean) / std).half().cpu()
        if i % 3200 == 0:
            print(f"{i} of {len(drawn)}", flush=True)
    torch.save({"latents": latents, "seed": args.seed}, args.out)


def draw(count: int, seed: int) -> list[scenes.Scene]:
    """The scenes behind a cache; a seed always gives the same ones."""
    rng = random.Random(seed)
    return [scenes.sample_scene(rng) for _ in range(count)]


class Batches:
    """Endless batches of (latents, padded caption ids, caption lengths), short and long ones apart."""

    def __init__(self, path: Path, device: torch.device, seed: int) -> None:
        stored = torch.load(path, mmap=True)
        self.latents = stored["latents"].to(device)
        self.drawn = draw(len(self.latents), stored["seed"])
        self.tokenizer = build_tokenizer()
        self.prefix = torch.tensor(self.tokenizer(PREFIX).input_ids, device=device)
        self.rng = random.Random(seed)
        self.device = device

    def _ids(self, caption: str) -> list[int]:
        return self.tokenizer(PREFIX + caption + SUFFIX).input_ids[PREFIX_TOKENS:]

    def next(self, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Two half batches, the one of the shorter captions first."""
        chosen = self.rng.sample(range(len(self.drawn)), size)
        captions = [" " if self.rng.random() < DROPOUT else scenes.caption(self.drawn[i], self.rng) for i in chosen]
        rows = sorted(zip(map(self._ids, captions), chosen, strict=True), key=lambda row: len(row[0]))
        return [self._pad(rows[: size // 2]), self._pad(rows[size // 2 :])]

    def _pad(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        longest = next(n for n in LENGTHS if n >= int(lengths.max()))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, (values, _) in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values)
        chosen = torch.tensor([i for _, i in rows], device=self.device)
        return self.latents[chosen].float(), ids.to(self.device), lengths.to(self.device)


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
        self.model = nn.ModuleDict(
            {
                "text_encoder": models.build_text_encoder(batches.tokenizer),
                "transformer": models.build_transformer(args.layers, args.heads),
            }
        ).to(self.device)
        self.model["text_encoder"].model.visual.requires_grad_(False)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = self._optimizers()
        self.block = torch.compile(models.block_forward, dynamic=False) if args.compile else models.block_forward
        self.encode = torch.compile(models.encode_text, dynamic=False) if args.compile else models.encode_text
        encoder, transformer = self.model["text_encoder"], self.model["transformer"]
        self.text_tables = models.text_tables(encoder, PREFIX_TOKENS + LENGTHS[-1])
        self.image_tables = {n: models.image_tables(transformer, n) for n in LENGTHS}
        self.step, self.seen = 0, 0

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices within blocks and layers, AdamW for all else."""
        inner, rest = [], []
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                matrix = p.ndim == 2 and (".layers." in name or "blocks." in name) and "_mod." not in name
                (inner if matrix else rest).append(p)
        return [
            torch.optim.Muon(inner, lr=self.args.lr_muon, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def loss(self, latents: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Mean squared error of the velocity on one half batch."""
        clean = models.pack(latents)
        noise = torch.randn_like(clean)
        sigma = sample_sigma(len(clean), self.device)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        cos, sin = self.image_tables[ids.shape[1]]
        mask = torch.zeros(len(ids), 1, 1, ids.shape[1] + clean.shape[1], device=self.device)
        unused = torch.arange(ids.shape[1], device=self.device) >= lengths[:, None]
        mask[:, 0, 0, : ids.shape[1]] = unused.float() * -1e9
        with torch.autocast(self.device.type, torch.bfloat16):
            text = self.encode(self.model["text_encoder"], self.batches.prefix, ids, *self.text_tables)
            out = models.predict(self.model["transformer"], noisy, text, mask, sigma, cos, sin, self.block)
        return (out.float() - (noise - clean)).square().mean()

    def train_step(self, progress: float) -> float:
        """One step on a whole batch; `progress` is the share of the time used, 0..1."""
        rate = min(1.0, (self.step + 1) / 150) * min(1.0, max(0.01, (1 - progress) / (1 - self.args.decay_from)))
        total = 0.0
        for half in self.batches.next(self.args.batch_size):
            loss = self.loss(*half) / 2
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer, peak in zip(self.optimizers, (self.args.lr_muon, self.args.lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step, self.seen = self.step + 1, self.seen + self.args.batch_size
        return float(total)

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seen": self.seen,
            "layers": self.args.layers,
            "heads": self.args.heads,
        }

    def resume(self, path: Path) -> None:
        stored = torch.load(path, map_location=self.device)
        self.model.load_state_dict(stored["model"])
        self.average.load_state_dict(stored["average"])
        for optimizer, state in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seen = stored["step"], stored["seen"]

    def save(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        part = self.args.out / "checkpoint.part"
        torch.save(self.state(), part)
        part.replace(self.args.out / "checkpoint.pt")


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    trainer = Trainer(args, Batches(args.latents, torch.device(args.device), args.seed))
    if args.resume:
        trainer.resume(args.resume)
    start = saved = shown = time.time()
    losses: list[float] = []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        losses.append(trainer.train_step(progress))
        now = time.time()
        if trainer.step % 50 == 0:
            speed = 50 * args.batch_size / (now - shown)
            print(
                f"step {trainer.step} seen {trainer.seen} t {now - start:.0f}s loss {np.mean(losses):.4f} "
                f"{speed:.0f} samples/s",
                flush=True,
            )
            losses, shown = [], now
        if now - saved > 180:
            trainer.save()
            saved = now
    trainer.save()
    print(f"done: {trainer.step} steps, {trainer.seen} samples, {(time.time() - start) / 60:.1f} minutes", flush=True)


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
    caching.add_argument("--scenes", type=int, default=60000)
    fitting.add_argument("--latents", type=Path, required=True)
    fitting.add_argument("--minutes", type=float, default=85)
    fitting.add_argument("--batch-size", type=int, default=128)
    fitting.add_argument("--lr", type=float, default=1.5e-3, help="AdamW: embeddings, norms, biases, modulation")
    fitting.add_argument("--lr-muon", type=float, default=2e-3, help="Muon: matrices within the blocks")
    fitting.add_argument("--decay-from", type=float, default=0.3, help="share of the time at full learning rate")
    fitting.add_argument("--layers", type=int, default=6)
    fitting.add_argument("--heads", type=int, default=6)
    fitting.add_argument("--resume", type=Path)
    args = parser.parse_args()
    (cache if args.command == "cache" else fit)(args)


if __name__ == "__main__":
    main()
