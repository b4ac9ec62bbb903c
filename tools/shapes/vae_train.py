"""Train the picture autoencoder: `AutoencoderKLQwenImage`, 256 x 256 pixels to a 16 x 16 x 16 latent.

    python -m tools.shapes.vae_train --out vae --minutes 2.5

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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import diffusers.models.autoencoders.autoencoder_kl_qwenimage as vae_module
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from tools.shapes import scenes
from tools.shapes.capture import captured
from tools.shapes.judge import judge
from tools.shapes.muon import Muon
from tools.shapes.table import CHUNK, NUM_LABELS, SceneTable, draw, layout, sample_table, tabulate

CONFIG = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 2, 4, 8],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 4,
}
LABEL_WEIGHT = 0.05
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
    """Encoder, latent noise, decoder, and a head that reads from each latent pixel what stands there.

    Noise makes the decoder forgive small errors of the transformer. The head, dropped after training, makes colours
    and shapes plain to see in the latents: the transformer learns to place them the sooner.
    """

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.head = layout_head(CONFIG["z_dim"])

    def forward(self, pictures: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """The loss. `noise` [B, 16, h, w] comes scaled in standard deviations; `labels` [B, 13, h, w] in 0..1."""
        latents = encode(self.vae, pictures).float()
        noisy = latents + noise * latents.detach().std((0, 2, 3), keepdim=True)
        seen = self.head(noisy / 10).float()
        loss = loss_of(decode(self.vae, noisy).float(), pictures, latents)
        return loss + LABEL_WEIGHT * F.binary_cross_entropy_with_logits(seen, labels)


def layout_head(z_dim: int) -> torch.nn.Module:
    """A head that reads from each latent pixel what stands there."""
    return torch.nn.Sequential(torch.nn.Conv2d(z_dim, 64, 1), torch.nn.SiLU(), torch.nn.Conv2d(64, NUM_LABELS, 1))


def loss_of(out: torch.Tensor, target: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """L1 and L2, six times as heavy along edges, and a slight pull of the latents to zero."""
    high, low = F.max_pool2d(target, 5, 1, 2), -F.max_pool2d(-target, 5, 1, 2)
    weight = 1 + 5 * (high - low).amax(1, keepdim=True).clamp(max=1)
    error = (out - target).abs()
    return (weight * (error + error.square())).mean() + 1e-5 * latents.square().mean()


class Pictures:
    """Endless batches of drawn scenes, moved and resized a little off their grid."""

    def __init__(self, table: SceneTable) -> None:
        self.table = table
        # Smooth backgrounds are the hard part, so gradients come more often than their share.
        (gradient,) = torch.where(table.backgrounds[:, 0] != table.backgrounds[:, 1])
        self.rows = torch.cat((torch.arange(len(table), device=gradient.device), gradient, gradient))

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """Pictures [size, 3, 256, 256] in -1..1, channels last in memory, and their rows of `things`."""
        device = self.rows.device
        chosen = self.rows[torch.randint(len(self.rows), (size,), device=device)]
        things = self.table.things[chosen].int()
        things[:, :, 2:4] += torch.randint(-3, 4, (size, 1, 2), device=device, dtype=torch.int32)
        grown = 2 * torch.randint(-2, 3, (size, 3), device=device, dtype=torch.int32)
        things[:, :, 4] += torch.where(things[:, :, 4] > 0, grown, 0)
        return draw(self.table.backgrounds[chosen], things).contiguous(memory_format=torch.channels_last), things


def train(args: argparse.Namespace, device: torch.device) -> AutoencoderKLQwenImage:
    """The averaged autoencoder after `args.minutes`, in which the learning rate falls to zero."""
    torch.manual_seed(args.seed)
    use_one_frame_forms()
    table = sample_table(args.scenes, args.seed)  # before the device is touched, for it forks
    stream = Pictures(table.to(device))
    model = Autoencoder(AutoencoderKLQwenImage(**CONFIG)).to(device)
    if args.start:
        model.vae.load_state_dict(AutoencoderKLQwenImage.from_pretrained(args.start).state_dict())
    # Latents already cached stay true only while the encoder stays as it is.
    model.requires_grad_(not args.decoder_only)
    model.vae.decoder.requires_grad_(True)
    loss_of_batch = torch.compile(model, dynamic=False) if args.compile else model

    def loss() -> Tensor:
        pictures, things = stream.next(args.batch_size)
        side = pictures.shape[-1] // 16
        noise = sample_noise((args.batch_size, CONFIG["z_dim"], side, side), args.noise, device)
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of_batch(pictures, noise, layout(things, side))

    return optimize(model, loss, args, device, lambda average: save(average.vae, args.out, device)).vae


def sample_noise(shape: tuple[int, ...], highest: float, device: torch.device) -> Tensor:
    """Noise whose deviation is drawn anew for each picture, from 0 to `highest`."""
    return torch.randn(shape, device=device) * highest * torch.rand(shape[0], 1, 1, 1, device=device)


def optimize(
    model: torch.nn.Module,
    loss_of_next: Callable[[], Tensor],
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Callable[[torch.nn.Module], None],
    after_step: Callable[[], None] = lambda: None,
) -> torch.nn.Module:
    """Step on `loss_of_next` for `args.minutes`. Returns the averaged model, which `checkpoint` gets now and then."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    average = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Norm weights are [C, 1, 1] or [C, 1, 1, 1].
    kernels = [p for p in trained if p.ndim > 3 and p.shape[1] > 1]
    rest = [p for p in trained if p.ndim <= 3 or p.shape[1] == 1]
    peaks = (args.lr_muon, args.lr)
    rates = [torch.zeros((), device=device) for _ in peaks]  # tensors: a replay reads them
    optimizers = [
        Muon(kernels, lr=rates[0], match_adam=False),
        torch.optim.AdamW(
            rest, lr=rates[1], betas=(0.9, 0.97), weight_decay=0, fused=True, capturable=device.type == "cuda"
        ),
    ]

    def update() -> Tensor:
        loss = loss_of_next()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        after_step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    if device.type == "cuda" and args.capture:
        update = captured(update)
    averaged = list(average.parameters()), list(model.parameters())
    start = saved = time.time()
    step, recent = 0, []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        share = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for rate, peak in zip(rates, peaks, strict=True):
            rate.fill_(peak * share)
        recent.append(update())
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(*averaged, 1 - decay)
        step += 1
        if step % 100 == 0:
            mean, seconds = float(torch.stack(recent).mean()), time.time() - start
            print(f"step {step} seen {step * args.batch_size} t {seconds:.0f}s loss {mean:.4f}", flush=True)
            recent = []
        if time.time() - saved > 60:
            checkpoint(average)
            saved = time.time()
    return average


@torch.no_grad()
def save(vae: AutoencoderKLQwenImage, out: Path, device: torch.device) -> None:
    """Measure the latents of fresh training scenes, put mean and deviation in the config, and write."""
    stream = Pictures(sample_table(CHUNK, 12345).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        latents = torch.cat([encode(vae, stream.next(32)[0]).float() for _ in range(16)])
    saved = copy.deepcopy(vae)
    clear_unused_slices(saved)
    saved.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
    saved.save_pretrained(out)


@torch.no_grad()
def measure(
    vae: AutoencoderKLQwenImage, device: torch.device, count: int = 400, seed: int = 99, noise: float = 0.0
) -> dict[str, float]:
    """Mean quality [dB] of reconstructions of new scenes, and the share of them the judge reads right.

    `noise`, in standard deviations, is added to the latents.
    """
    rng, decibels, right = random.Random(seed), [], 0
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    backgrounds, things = (torch.from_numpy(column).to(device) for column in tabulate(drawn))
    for i in range(0, count, 16):
        pictures = draw(backgrounds[i : i + 16], things[i : i + 16])
        latents = encode(vae, pictures)
        latents = latents + noise * latents.std((0, 2, 3), keepdim=True) * torch.randn_like(latents)
        out = decode(vae, latents).clamp(-1, 1)
        decibels += (-10 * torch.log10((out - pictures).square().mean((1, 2, 3)) / 4)).tolist()
        shown = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right += sum(judge(p, scenes.caption(s, rng)).right for p, s in zip(shown, drawn[i : i + 16], strict=True))
    return {"psnr_db": round(sum(decibels) / count, 2), "judged_right": round(right / count, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What training any autoencoder of scenes takes."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=100000, help="scenes sampled once and drawn again and again")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: norms and biases")
    parser.add_argument("--lr-muon", type=float, default=0.02, help="Muon: kernels")
    parser.add_argument("--noise", type=float, default=0.25, help="highest latent noise, in standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-capture", dest="capture", action="store_false", help="no CUDA graph of the step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--decoder-only", action="store_true", help="with --start: leave the encoder as it is")
    parser.add_argument("--start", type=Path, help="autoencoder folder to go on from")
    args = parser.parse_args()
    device = torch.device(args.device)
    started = time.time()
    vae = train(args, device)
    save(vae, args.out, device)
    report = {"minutes": round((time.time() - started) / 60, 2)}
    (args.out / "training.json").write_text(json.dumps(report))
    noisy = {f"noisy_{key}": value for key, value in measure(vae, device, noise=0.2).items()}
    report |= {**measure(vae, device), **noisy}
    (args.out / "training.json").write_text(json.dumps(report))
    print(report)


if __name__ == "__main__":
    main()
