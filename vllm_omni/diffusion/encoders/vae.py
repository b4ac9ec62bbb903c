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
