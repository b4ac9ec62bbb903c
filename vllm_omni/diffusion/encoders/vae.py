"""Autoencoders of diffusers, as pipelines use them.

Shapes: N outputs, C latent channels, F frames, H and W latent height and width.
"""

from __future__ import annotations

from typing import Any

import torch


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """``latents [N, C, F, H, W]``, normalised per channel ``-> pixels [N, 3, frames, height, width] in [-1, 1]``.

    The autoencoder's configuration holds mean and standard deviation of each latent channel.
    """
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device, dtype=torch.float32).view(shape)
    std = torch.tensor(vae.config.latents_std, device=latents.device, dtype=torch.float32).view(shape)
    pixels: torch.Tensor = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]
    return pixels


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
