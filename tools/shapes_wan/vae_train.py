"""Train the autoencoder of clips: `AutoencoderKLWan`, each frame of 128 x 128 pixels to a latent of 16 x 8 x 8.

Nothing is packed along time, so that a clip may have any number of frames, and frames are coded one by one: of each
causal kernel only the last time slice is trained, as a 2-D convolution on single pictures, and the saved weights hold
zeros in the others. The unchanged class then gives the same result. Patches of 4 x 4 pixels are channels, as in the
autoencoder of Wan 2.2 TI2V-5B: wide convolutions on few pixels are what GPUs and CPUs are fast at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers.models.autoencoders.autoencoder_kl_wan as vae_module
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from tools.shapes.muon import Muon
from tools.shapes.vae_train import clear_unused_slices, loss_of, use_one_frame_forms
from tools.shapes_wan.clips import caption
from tools.shapes_wan.judge import judge
from tools.shapes_wan.loop import Loop
from tools.shapes_wan.table import ClipTable, draw_clips

LATENT_CHANNELS, LATENT_SIDE = 16, 8
PATCH = 4
CONFIG = {
    "base_dim": 16,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [3, 3, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 2,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "patch_size": PATCH,
    "scale_factor_temporal": 1,
    "scale_factor_spatial": 4 * PATCH,
}
EMA_DECAY = 0.998


def build_vae() -> AutoencoderKLWan:
    """A random autoencoder of 1.8 million parameters, two thirds of which stay zero."""
    return AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS)


@contextmanager
def single_frames() -> Iterator[None]:
    """While this lasts, the classes of the autoencoder take single frames, fast."""
    classes = (vae_module.WanCausalConv3d, vae_module.WanRMS_norm, vae_module.WanUpsample)
    forwards = [patched.forward for patched in classes]
    use_one_frame_forms(vae_module, "Wan")
    vae_module.WanRMS_norm.forward = _norm
    try:
        yield
    finally:
        for patched, forward in zip(classes, forwards, strict=True):
            patched.forward = forward


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    """The same norm of [B, C, ...] by one kernel, where channels come last in memory."""
    with torch.autocast(x.device.type, enabled=False):
        normed = F.rms_norm(x.movedim(1, -1), self.gamma.shape[:1], self.gamma.flatten().to(x.dtype), eps=1e-12)
    return normed.movedim(-1, 1)


def encode(vae: AutoencoderKLWan, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 to the latent mode [B, C, H/16, W/16], not normalised, by `single_frames`."""
    patches = vae_module.patchify(pictures.unsqueeze(2), PATCH)[:, :, 0].contiguous(memory_format=torch.channels_last)
    return vae.quant_conv(vae.encoder(patches.unsqueeze(2)))[:, :, 0].chunk(2, 1)[0]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w], not normalised, to pictures [B, 3, 16h, 16w], by `single_frames`."""
    latents = latents.contiguous(memory_format=torch.channels_last)
    return vae_module.unpatchify(vae.decoder(vae.post_quant_conv(latents.unsqueeze(2))), PATCH)[:, :, 0]


def sample_pictures(table: ClipTable, count: int) -> Tensor:
    """Single frames [count, 3, height, width] in -1..1."""
    return draw_clips(*table.sample_frames(count))[:, 0]


@single_frames()
def train_vae(
    minutes: float,
    device: torch.device,
    on_progress: Callable[[AutoencoderKLWan], None],
    *,
    batch_size: int = 256,
    lr: float = 2e-3,
    lr_muon: float = 0.02,
    highest_noise: float = 0.25,
    capture: bool = True,
) -> AutoencoderKLWan:
    """Train for `minutes`. Returns the averaged weights, with which `on_progress` is called now and then.

    The decoder sees latents with up to `highest_noise` standard deviations of noise, so that it forgives small errors
    of the transformer.
    """
    table, vae = ClipTable(device), build_vae().to(device)

    def loss() -> Tensor:
        pictures = sample_pictures(table, batch_size)
        noise = torch.randn(batch_size, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, device=device)
        noise *= highest_noise * torch.rand(batch_size, 1, 1, 1, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = encode(vae, pictures).float()
            std = latents.detach().std((0, 2, 3), keepdim=True)
            out = decode(vae, latents + noise * std).float()
        return loss_of(out, pictures, latents)

    rates = [torch.zeros((), device=device) for _ in range(2)]
    kernels = [p for p in vae.parameters() if p.ndim > 3 and p.shape[1] > 1]
    rest = [p for p in vae.parameters() if p.ndim <= 3 or p.shape[1] == 1]
    on_gpu = device.type == "cuda"
    loop = Loop(
        vae,
        loss,
        [
            Muon(kernels, lr=rates[0], match_adam=False),
            torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.97), weight_decay=0, fused=True, capturable=on_gpu),
        ],
        rates,
        (lr_muon, lr),
        schedule=lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
        ema_decay=EMA_DECAY,
    )
    loop.run(minutes, batch_size, capture=capture, on_progress=lambda: on_progress(finished(loop.average)))
    return finished(loop.average)


@torch.no_grad()
def finished(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy whose config holds mean and deviation of the latents of training pictures."""
    table, saved = ClipTable(vae.device), copy.deepcopy(vae)
    clear_unused_slices(saved)
    latents = torch.cat([encode(saved, sample_pictures(table, 256)).float() for _ in range(8)])
    saved.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3)).tolist()],
    )
    return saved


@single_frames()
@torch.no_grad()
def measure(vae: AutoencoderKLWan, count: int, noise: float = 0.0) -> dict[str, float]:
    """Quality [dB] of reconstructed clips, and the share of them that the judge reads right.

    `noise` is put on the latents, in standard deviations of each channel.
    """
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
