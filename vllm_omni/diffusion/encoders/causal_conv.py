"""Causal 3D convolutions of video autoencoders on a single picture.

Shapes: B pictures, C channels, F frames, H and W in latent pixels or pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def use_single_frame_convolutions(autoencoder: nn.Module) -> None:
    """Let causal 3D convolutions compute one frame as 2D convolutions, with a third of the arithmetic.

    A video autoencoder pads the past of the first frame with zeros, so all but the last slice of a kernel along time
    multiply zeros there. Longer inputs, and inputs with a cached past, run as before.
    """
    for module in autoencoder.modules():
        if _is_causal(module):
            module.forward = _SingleFrameForward(module)


def use_spatial_padding(autoencoder: nn.Module) -> None:
    """Let causal 3D convolutions pad height and width as they compute, instead of copying their input first."""
    for module in autoencoder.modules():
        if _is_causal(module):
            module.forward = _PaddedForward(module)


def _is_causal(module: nn.Module) -> bool:
    """Whether a convolution pads the past along time alone: diffusers keeps ``(W, W, H, H, past, 0)`` for F.pad."""
    padding = getattr(module, "_padding", None)
    return isinstance(module, nn.Conv3d) and isinstance(padding, tuple) and len(padding) == 6 and padding[5] == 0


class _PaddedForward:
    """The ``forward`` of one convolution. The past is given, zeros, or both."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        self._past = conv._padding[4]
        self._padding = (0, conv._padding[2], conv._padding[0])

    def __call__(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, C, F, H, W] -> [B, C', F', H', W']``."""
        conv, parts = self._conv, [x]
        if cache_x is not None and self._past > 0:
            parts.insert(0, cache_x)
        num_missing = self._past - sum(part.shape[2] for part in parts[:-1])
        if num_missing > 0:
            parts.insert(0, torch.zeros_like(x[:, :, :1]).expand(-1, -1, num_missing, -1, -1))
        joined = x if len(parts) == 1 else torch.cat(parts, dim=2)
        joined = joined[:, :, max(-num_missing, 0) :]
        return F.conv3d(joined, conv.weight, conv.bias, conv.stride, self._padding, conv.dilation, conv.groups)


class _SingleFrameForward:
    """The ``forward`` of one convolution."""

    def __init__(self, conv: Any) -> None:
        self._original = conv.forward
        self._conv = conv
        self._past = conv._padding[4]
        self._padding = (conv._padding[2], conv._padding[0])
        is_channels_last = conv.weight.stride(1) == 1
        order = torch.channels_last if is_channels_last else torch.contiguous_format
        self._weight = conv.weight.detach()[:, :, -1].contiguous(memory_format=order)

    def __call__(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, C, F, H, W] -> [B, C', F', H', W']``."""
        if x.shape[2] != 1 or cache_x is not None or self._past != self._conv.kernel_size[0] - 1:
            return self._original(x) if cache_x is None else self._original(x, cache_x)
        _, *stride = self._conv.stride
        return F.conv2d(x[:, :, 0], self._weight, self._conv.bias, stride, self._padding).unsqueeze(2)
