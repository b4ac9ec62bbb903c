"""Autoencoders whose channels lie together in memory, from outside: the order in which a GPU's convolutions compute.

Otherwise each convolution turns its input around, and its output back. Norms are computed by kernels that keep this
order, together with the SiLU after them.

Shapes: N pictures, C channels, ``...`` frames, height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.encoders.causal_conv import use_spatial_padding
from vllm_omni.diffusion.encoders.channel_norm import is_channel_norm
from vllm_omni.diffusion.layers import kernels

# How modules of diffusers name their norms, and the activation that follows each of them.
_ACTIVATED_NORMS = (
    (("norm1", "norm2"), "nonlinearity"),
    (("norm_out",), "nonlinearity"),
    (("conv_norm_out",), "conv_act"),
)


def use_channels_last(autoencoder: nn.Module) -> None:
    """Let an autoencoder compute with channels-last memory. What it computes stays the same, up to rounding."""
    use_spatial_padding(autoencoder)
    module: Any
    for module in autoencoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            order = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=order)
        elif isinstance(module, nn.Upsample) and module.mode.startswith("nearest"):
            # Values are copied, so that the detour of some of these modules through float32 changes nothing.
            module.forward = _NearestForward(module)  # type: ignore[assignment]
        elif isinstance(module, nn.GroupNorm) or is_channel_norm(module):
            module.forward = _NormForward(module)
    for module in autoencoder.modules():
        _fuse_activations(module)


def _fuse_activations(module: Any) -> None:
    """Let norms compute the SiLU after them, where that is all that uses it."""
    if getattr(module, "time_emb_proj", None) is not None or getattr(module, "time_embedding_norm", None) == "spatial":
        return
    for names, activation in _ACTIVATED_NORMS:
        norms: list[Any] = [getattr(module, name, None) for name in names]
        if not isinstance(getattr(module, activation, None), nn.SiLU) or not all(
            isinstance(norm, nn.Module) and isinstance(norm.forward, _NormForward) for norm in norms
        ):
            continue
        for norm in norms:
            norm.forward.silu = True
        setattr(module, activation, nn.Identity())


class _NormForward:
    """The ``forward`` of one norm, by group of channels or of each pixel, then SiLU if ``silu``."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm
        self._original = norm.forward
        self.silu = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, ...] -> [N, C, ...]``."""
        norm = self._norm
        if not kernels.take(x):
            normalized: torch.Tensor = self._original(x)
            return F.silu(normalized) if self.silu else normalized
        from vllm_omni.diffusion.layers.kernels.channel_norm import channel_rms_norm, group_norm

        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        if isinstance(norm, nn.GroupNorm):
            return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, self.silu)
        bias = norm.bias if isinstance(norm.bias, torch.Tensor) else None
        return channel_rms_norm(x, norm.gamma, bias, norm.scale, self.silu)


class _NearestForward:
    """The ``forward`` of one upsampling."""

    def __init__(self, upsample: nn.Upsample) -> None:
        self._upsample = upsample

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W] -> [N, C, H', W']``."""
        upsample = self._upsample
        return F.interpolate(x, upsample.size, upsample.scale_factor, upsample.mode)
