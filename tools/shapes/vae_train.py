"""Train the picture autoencoder: `AutoencoderKLQwenImage`, 256 x 256 pixels to a 16 x 16 x 16 latent.

    python -m tools.shapes.vae_train --out vae --minutes 22

The class is a video model. For one frame its causal convolutions see zeros in the past, so only the
last time slice of each kernel counts. Training uses that slice alone as a 2-D convolution, and the
saved weights hold zeros in the others: the unchanged class then gives the same result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from types import ModuleType

import diffusers.models.autoencoders.autoencoder_kl_qwenimage as vae_module
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from tools.shapes import scenes
from tools.shapes.judge import judge
from tools.shapes.muon import Muon
from tools.shapes.table import SceneTable, draw, sample_table, tabulate

CONFIG = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 2, 4, 8],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 4,
}
CROP = 128  # side [px] of the crops of the first training phase
EMA_DECAY = 0.997


def _conv_2d(self: torch.nn.Conv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """One-frame form of the causal convolution, [B, C, 1, H, W]."""
    left, _, top = self._padding[:3]
    out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (top, left))
    return out.unsqueeze(2)


def _norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same norm in one pass that a compiler can fuse."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().sum(1, keepdim=True) + 1e-12)
    return (wide * scale * self.scale * self.gamma).to(x.dtype)


def _upsample(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def use_one_frame_forms(module: ModuleType = vae_module, family: str = "QwenImage") -> None:
    """Patch the diffusers classes of a family with the fast forms above (for this process)."""
    for name, form in (("CausalConv3d", _conv_2d), ("RMS_norm", _norm), ("Upsample", _upsample)):
        getattr(module, family + name).forward = form


def clear_unused_slices(vae: torch.nn.Module) -> None:
    """Zero the kernel slices that one frame never meets."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data[:, :, :-1] = 0


def encode(vae: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 to the latent mode [B, 16, H/16, W/16], not normalised."""
    moments = vae.quant_conv(vae.encoder(pictures.unsqueeze(2)))[:, :, 0]
    return moments.chunk(2, 1)[0]


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, h, w], not normalised, to pictures [B, 3, 16h, 16w]."""
    return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]


class Autoencoder(torch.nn.Module):
    """Encoder, latent noise, decoder. Noise makes the decoder forgive small errors of the transformer."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`noise` [B, 16, h, w] comes scaled in standard deviations. Returns picture and latent."""
        latents = encode(self.vae, pictures).float()
        std = latents.detach().std((0, 2, 3), keepdim=True)
        return decode(self.vae, latents + noise * std).float(), latents


def loss_of(out: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """L1 and L2, four times as heavy along edges, and a slight pull of the latents to zero."""
    high, low = F.max_pool2d(target, 5, 1, 2), -F.max_pool2d(-target, 5, 1, 2)
    weight = 1 + 3 * (high - low).amax(1, keepdim=True).clamp(max=1)
    error = (out - target).abs()
    return (weight * (error + error.square())).mean() + 1e-5 * latents.square().mean()


class Pictures:
    """Endless batches of drawn scenes, whole or as crops that mostly show some object."""

    def __init__(self, table: SceneTable) -> None:
        self.table = table
        # Smooth backgrounds are the hard part, so gradients come more often than their share.
        gradient = table.backgrounds[:, 0] != table.backgrounds[:, 1]
        self.weights = torch.where(gradient, 3.0, 1.0)
        self.num_things = (table.things[:, :, 4] > 0).sum(1)

    def next(self, size: int, crop: bool) -> Tensor:
        """[size, 3, H, W] in -1..1, channels last in memory."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        rows = self.table.backgrounds[chosen], self.table.things[chosen]
        if not crop:
            return draw(*rows).contiguous(memory_format=torch.channels_last)
        device = chosen.device
        pick = (torch.rand(size, device=device) * self.num_things[chosen]).long()
        thing = rows[1][torch.arange(size, device=device), pick].float()
        spread = torch.where(torch.rand(size, 1, device=device) < 0.85, 60.0, 300.0)
        offset = (2 * torch.rand(size, 2, device=device) - 1) * spread
        corners = thing[:, 2:4] + thing[:, 4:] / 2 - CROP / 2 + offset
        corners = corners.clamp(0, scenes.PICTURE_SIZE - CROP).long()
        return draw(*rows, corners, CROP).contiguous(memory_format=torch.channels_last)


def train(args: argparse.Namespace, device: torch.device) -> AutoencoderKLQwenImage:
    """Crops first, whole pictures for the rest; the learning rate falls with the wall clock."""
    torch.manual_seed(args.seed)
    use_one_frame_forms()
    model = Autoencoder(AutoencoderKLQwenImage(**CONFIG)).to(device)
    average = copy.deepcopy(model.vae).requires_grad_(False)
    stream = Pictures(sample_table(args.scenes, args.seed).to(device))
    if args.start:
        model.vae.load_state_dict(AutoencoderKLQwenImage.from_pretrained(args.start).state_dict())
        average.load_state_dict(model.vae.state_dict())
    # Latents already cached stay true only while the encoder stays as it is.
    trained = [p for name, p in model.named_parameters() if not args.decoder_only or "decoder" in name]
    # Norm weights are [C, 1, 1] or [C, 1, 1, 1].
    kernels = [p for p in trained if p.ndim > 3 and p.shape[1] > 1]
    rest = [p for p in trained if p.ndim <= 3 or p.shape[1] == 1]
    optimizers = [
        Muon(kernels, lr=args.lr_muon, match_adam=False),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.97), weight_decay=0),
    ]
    step_of = torch.compile(model, dynamic=False) if args.compile else model
    start, step, seen, recent = time.time(), 0, 0, []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        crop = progress < args.crop_share
        size = args.batch_size
        rate = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for optimizer, peak in zip(optimizers, (args.lr_muon, args.lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        pictures = stream.next(size, crop)
        side = pictures.shape[-1] // 16
        noise = torch.randn(size, CONFIG["z_dim"], side, side, device=device)
        noise *= args.noise * torch.rand(size, 1, 1, 1, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out, latents = step_of(pictures, noise)
        loss = loss_of(out, pictures, latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.vae.parameters()), 1 - decay)
        step, seen = step + 1, seen + size
        if step % 100 == 0:
            mean = float(torch.stack(recent).mean())
            print(f"step {step} seen {seen} t {time.time() - start:.0f}s loss {mean:.4f} rate {rate:.3f}", flush=True)
            recent = []
        if step % 500 == 0:
            save(average, args.out, device)
    return average


@torch.no_grad()
def save(vae: AutoencoderKLQwenImage, out: Path, device: torch.device) -> None:
    """Measure the latents of fresh training scenes, put mean and deviation in the config, and write."""
    stream = Pictures(sample_table(256, 12345).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        latents = torch.cat([encode(vae, stream.next(32, crop=False)).float() for _ in range(8)])
    saved = copy.deepcopy(vae)
    clear_unused_slices(saved)
    saved.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
    saved.save_pretrained(out)


@torch.no_grad()
def measure(vae: AutoencoderKLQwenImage, device: torch.device, count: int = 300, seed: int = 99) -> dict[str, float]:
    """Mean quality [dB] of reconstructions of new scenes, and the share of them the judge reads right."""
    rng, decibels, right = random.Random(seed), [], 0
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    backgrounds, things = (torch.from_numpy(column).to(device) for column in tabulate(drawn))
    for i in range(0, count, 16):
        pictures = draw(backgrounds[i : i + 16], things[i : i + 16])
        out = decode(vae, encode(vae, pictures)).clamp(-1, 1)
        decibels += (-10 * torch.log10((out - pictures).square().mean((1, 2, 3)) / 4)).tolist()
        shown = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right += sum(judge(p, scenes.caption(s, rng)).right for p, s in zip(shown, drawn[i : i + 16], strict=True))
    return {"psnr_db": round(sum(decibels) / count, 2), "judged_right": round(right / count, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=22)
    parser.add_argument("--batch-size", type=int, default=8, help="crops or whole pictures per step")
    parser.add_argument("--crop-share", type=float, default=0.6, help="share of the time spent on crops")
    parser.add_argument("--scenes", type=int, default=20000, help="scenes sampled once and drawn again and again")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: norms and biases")
    parser.add_argument("--lr-muon", type=float, default=0.02, help="Muon: kernels")
    parser.add_argument("--noise", type=float, default=0.25, help="highest latent noise, in standard deviations")
    parser.add_argument("--decoder-only", action="store_true", help="with --start: leave the encoder as it is")
    parser.add_argument("--start", type=Path, help="autoencoder folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    device = torch.device(args.device)
    started = time.time()
    vae = train(args, device)
    save(vae, args.out, device)
    report = {"minutes": round((time.time() - started) / 60, 2), **measure(vae, device)}
    (args.out / "training.json").write_text(json.dumps(report))
    print(report)


if __name__ == "__main__":
    main()
