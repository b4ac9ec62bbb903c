"""RMS normalisation over channels, as video autoencoders have it, where torch's vector norm is slow.

Shapes: B pictures, C channels, ``...`` frames, height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def use_squared_sums(autoencoder: nn.Module) -> None:
    """Let norms over the channel dimension compute with a sum of squares instead of ``F.normalize``.

    On CPUs the vector norm over a dimension that is not the last one takes several times as long: it was most of the
    time of decoding a picture.
    """
    for module in autoencoder.modules():
        if is_channel_norm(module):
            module.forward = _SquaredSumForward(module)


def is_channel_norm(module: nn.Module) -> bool:
    """Whether a module is diffusers' RMS norm of channels: ``normalize(x, dim=1) * scale * gamma + bias``."""
    return getattr(module, "channel_first", False) is True and hasattr(module, "gamma") and hasattr(module, "scale")


class _SquaredSumForward:
    """The ``forward`` of one norm."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, ...] -> [B, C, ...]``, normalised in float32."""
        values = x.float()
        squared = values.square().sum(dim=1, keepdim=True)
        # As F.normalize, which bounds the norm by 1e-12.
        normalized = (values * squared.clamp_min(1e-24).rsqrt()).to(x.dtype)
        return normalized * (self._norm.gamma * self._norm.scale) + self._norm.bias
