"""Autoencoders whose channels lie together in memory, from outside: the order in which a GPU's convolutions compute.

Otherwise each convolution turns its input around, and its output back. Norms are computed by kernels that keep this
order, together with the SiLU after them.

Shapes: N pictures, C channels, ``...`` frames, height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
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
        elif _doubles(module):
            module.forward = _UpsampleForward(module.conv if isinstance(module, Upsample2D) else None)
        elif (isinstance(module, nn.GroupNorm) and module.affine) or is_channel_norm(module):
            module.forward = _NormForward(module)
    for module in autoencoder.modules():
        _fuse_activations(module)
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = _ResidualForward(module)


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

    def __call__(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, C, ...] -> [N, C, ...]``. A group norm adds ``shift [C]`` first."""
        norm = self._norm
        if not kernels.take(x):
            normalized: torch.Tensor = self._original(x if shift is None else x + shift[:, None, None])
            return F.silu(normalized) if self.silu else normalized
        from vllm_omni.diffusion.layers.kernels.channel_norm import channel_rms_norm, group_norm

        x = channels_last(x)
        if isinstance(norm, nn.GroupNorm):
            return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, self.silu, shift)
        bias = norm.bias if isinstance(norm.bias, torch.Tensor) else None
        return channel_rms_norm(x, norm.gamma, bias, norm.scale, self.silu)


class _ResidualForward:
    """The ``forward`` of one residual block: norms and the sum add the biases of the convolutions before them."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __call__(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """``[N, C, H, W] -> [N, C', H, W]``."""
        block = self._block
        hidden = _without_bias(block.conv1, block.norm1(x))
        hidden = _without_bias(block.conv2, block.norm2(hidden, block.conv1.bias))
        residual, bias = x, block.conv2.bias
        if block.conv_shortcut is not None:
            residual, bias = _without_bias(block.conv_shortcut, x), bias + block.conv_shortcut.bias
        if not kernels.take(x):
            return residual + hidden + bias[:, None, None]
        from vllm_omni.diffusion.layers.kernels.channel_norm import add_to

        return add_to(channels_last(hidden), channels_last(residual), bias)


def _is_plain(block: Any) -> bool:
    """Whether a residual block is two activated norms and convolutions of biases, and nothing else."""
    convolutions = [block.conv1, block.conv2, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
    return (
        block.time_emb_proj is None
        and block.time_embedding_norm in ("default", "group")  # a plain group norm, both
        and block.upsample is block.downsample is None
        and block.output_scale_factor == 1
        and all(isinstance(norm.forward, _NormForward) and norm.forward.silu for norm in (block.norm1, block.norm2))
        and all(conv.bias is not None for conv in convolutions)
    )


def _without_bias(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``[N, C, ...]``, the channels of a pixel one after the other in memory, and then the next pixel's."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class _UpsampleForward:
    """The ``forward`` of one module that doubles height and width by copies of the nearest pixel.

    Some of these modules compute that in float32, which changes nothing. A convolution may follow.
    """

    def __init__(self, conv: nn.Module | None = None) -> None:
        self._conv = conv

    def __call__(self, x: torch.Tensor, output_size: None = None) -> torch.Tensor:
        """``[N, C, H, W] -> [N, C', 2 H, 2 W]``."""
        if kernels.take(x) and x.dim() == 4:
            from vllm_omni.diffusion.layers.kernels.channel_norm import double_sides

            doubled = double_sides(channels_last(x))
        else:
            doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self._conv is None:
            return doubled
        output: torch.Tensor = self._conv(doubled)
        return output


def _doubles(module: Any) -> bool:
    """Whether a module is an upsampling by two, to the nearest pixel."""
    if isinstance(module, Upsample2D):
        plain = module.use_conv and not module.use_conv_transpose and module.interpolate and module.norm is None
        return plain and module.name == "conv"
    return (
        isinstance(module, nn.Upsample)
        and module.mode.startswith("nearest")
        and module.size is None
        and module.scale_factor in (2.0, (2.0, 2.0))
    )
