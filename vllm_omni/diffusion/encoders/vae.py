"""Autoencoders of diffusers, as pipelines use them.

Shapes: N outputs, C latent channels, F frames, H and W latent height and width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """``latents [N, C, F, H, W]``, normalised per channel ``-> pixels [N, 3, frames, height, width] in [-1, 1]``.

    An autoencoder of RGBA pictures gives 4 channels. Its configuration holds mean and standard deviation of each
    latent channel.
    """
    mean, std = _channel_statistics(vae, latents.device)
    pixels: torch.Tensor = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]
    return pixels


def encode_pixels(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``pixels [N, 3, frames, height, width] in [-1, 1] -> latents [N, C, F, H, W]``, normalised per channel.

    In float32. The most likely latents: no noise is drawn. The inverse of :func:`decode_latents`.
    """
    latents: torch.Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = _channel_statistics(vae, latents.device)
    return (latents.float() - mean) / std


def _channel_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, ``[1, C, 1, 1, 1]`` in float32."""
    mean, std = (
        torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def decode_scaled_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """``latents [N, C, H, W]``, normalised for all channels alike ``-> pixels [N, 3, height, width] in [-1, 1]``.

    The autoencoder's configuration holds the scale and the shift of its latents.
    """
    scale, shift = _scale_and_shift(vae)
    pixels: torch.Tensor = vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0]
    return pixels


def encode_scaled_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``pixels [N, 3, height, width] in [-1, 1] -> latents [N, C, H, W]`` in float32: the most likely ones, normalised.

    The inverse of :func:`decode_scaled_latents`. No noise is drawn.
    """
    scale, shift = _scale_and_shift(vae)
    latents: torch.Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents.float() - shift) * scale


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    """Autoencoders of older models have a scale and no shift."""
    shift = vae.config.shift_factor
    return vae.config.scaling_factor, 0.0 if shift is None else shift


def picture_pixels(picture: Image.Image) -> torch.Tensor:
    """A picture as pixels, ``[1, C, 1, height, width] in [-1, 1]`` in float32: one frame of its own channels."""
    values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return (2 * values - 1).permute(2, 0, 1)[None, :, None]
