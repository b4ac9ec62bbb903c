"""Train the autoencoder of clips: `AutoencoderKLWan`, each frame of 128 x 128 pixels to a latent of 16 x 8 x 8.

    python -m tools.shapes_wan.vae_train --out vae --minutes 3

Nothing is packed along time, so that a clip may have any number of frames, and frames are coded one by one: of each
causal kernel only the last time slice is trained, as a 2-D convolution on single pictures, and the saved weights hold
zeros in the others. The unchanged class then gives the same result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import diffusers.models.autoencoders.autoencoder_kl_wan as vae_module
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from tools.shapes.muon import Muon
from tools.shapes.vae_train import Autoencoder, clear_unused_slices, decode, encode, loss_of, use_one_frame_forms
from tools.shapes_wan.clips import caption
from tools.shapes_wan.judge import judge
from tools.shapes_wan.loop import Loop
from tools.shapes_wan.table import ClipTable, draw_clips

LATENT_CHANNELS, LATENT_SIDE = 16, 8
CONFIG = {
    "base_dim": 8,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [2, 2, 4, 6, 6],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 4,
    "scale_factor_temporal": 1,
    "scale_factor_spatial": 16,
}
EMA_DECAY = 0.998


def build_vae() -> AutoencoderKLWan:
    """A random autoencoder of 1.6 million parameters, two thirds of which stay zero."""
    return AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS)


def sample_pictures(table: ClipTable, count: int) -> Tensor:
    """Single frames [count, 3, height, width] in -1..1, channels last in memory."""
    return draw_clips(*table.sample_frames(count))[:, 0].contiguous(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> AutoencoderKLWan:
    """Train for the minutes given. Returns the averaged weights."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    use_one_frame_forms(vae_module, "Wan")
    device = torch.device(args.device)
    table = ClipTable(device)
    model = Autoencoder(AutoencoderKLWan.from_pretrained(args.start) if args.start else build_vae()).to(device)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    size = args.batch_size

    def loss() -> Tensor:
        pictures = sample_pictures(table, size)
        noise = torch.randn(size, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, device=device)
        noise *= args.noise * torch.rand(size, 1, 1, 1, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out, latents = forward(pictures, noise)
        return loss_of(out, pictures, latents)

    rates = [torch.zeros((), device=device) for _ in range(2)]
    kernels = [p for p in model.parameters() if p.ndim > 3 and p.shape[1] > 1]
    rest = [p for p in model.parameters() if p.ndim <= 3 or p.shape[1] == 1]
    optimizers = [
        Muon(kernels, lr=rates[0], match_adam=False),
        torch.optim.AdamW(
            rest, lr=rates[1], betas=(0.9, 0.97), weight_decay=0, fused=True, capturable=device.type == "cuda"
        ),
    ]
    loop = Loop(
        model,
        loss,
        optimizers,
        rates,
        (args.lr_muon, args.lr),
        schedule=lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
        ema_decay=EMA_DECAY,
    )
    loop.run(args.minutes, size, capture=args.capture, on_progress=lambda: save(loop.average.vae, args.out))
    return loop.average.vae


@torch.no_grad()
def save(vae: AutoencoderKLWan, out: Path) -> None:
    """Measure the latents of training pictures, put mean and deviation in the config, and write."""
    table = ClipTable(vae.device)
    latents = torch.cat([encode(vae, sample_pictures(table, 64)).float() for _ in range(32)])
    saved = copy.deepcopy(vae)
    clear_unused_slices(saved)
    saved.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
    saved.save_pretrained(out)


@torch.no_grad()
def measure(vae: AutoencoderKLWan, count: int, noise: float = 0.0) -> dict[str, float]:
    """Quality [dB] of reconstructed new clips, and the share of them that the judge reads right.

    `noise` is put on the latents, in standard deviations of each channel.
    """
    torch.manual_seed(99)
    table, decibels, right = ClipTable(vae.device), [], 0
    std = torch.tensor(vae.config.latents_std, device=vae.device)[:, None, None]
    for _ in range(count):
        chosen, backgrounds, things = table.sample(1)
        frames = draw_clips(backgrounds, things)[0]
        latents = encode(vae, frames)
        out = decode(vae, latents + noise * std * torch.randn_like(latents)).clamp(-1, 1)
        decibels.append(float(-10 * torch.log10((out - frames).square().mean() / 4)))
        shown = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right += judge(shown, caption(table.words[int(chosen)])).right
    return {"noise": noise, "psnr_db": round(sum(decibels) / count, 2), "judged_right": round(right / count, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=256, help="pictures per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: norms and biases")
    parser.add_argument("--lr-muon", type=float, default=0.02, help="Muon: kernels")
    parser.add_argument("--noise", type=float, default=0.25, help="highest latent noise, in standard deviations")
    parser.add_argument("--start", type=Path, help="autoencoder folder to go on from")
    parser.add_argument("--measure", type=int, default=100, help="clips to reconstruct at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-capture", dest="capture", action="store_false", help="no CUDA graph of the step")
    args = parser.parse_args()
    started = time.time()
    vae = train(args)
    save(vae, args.out)
    print(f"trained and saved after {time.time() - started:.0f} s", flush=True)
    stored = AutoencoderKLWan.from_pretrained(args.out).to(vae.device)
    reports = [measure(stored, args.measure, noise) for noise in (0.0, 0.15)]
    (args.out / "training.json").write_text(json.dumps(reports))
    print(reports, flush=True)


if __name__ == "__main__":
    main()
