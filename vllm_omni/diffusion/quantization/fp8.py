"""Linear layers in FP8 (e4m3, arXiv:2209.05433): weights by output channel, activations by token.

A weight is quantized as it is loaded, tensor by tensor, so that no more than one of them is in memory in its own
precision. The scale of an activation is that of the token at hand: nothing is calibrated.

Shapes: R rows (tokens), I input features, O output features.
"""

from __future__ import annotations

import torch

from vllm_omni.diffusion.layers import kernels
from vllm_omni.diffusion.layers.linear import LinearBase, LinearMethod

FP8_MAX = 448.0  # the largest number of e4m3
_SMALLEST = 1e-12  # of a row of zeros
_MULTIPLE = 16  # of the features that the scaled product takes


def choose_fp8(input_size: int, output_size: int) -> LinearMethod:
    """FP8, or the plain method for a layer of a size that the scaled product does not take."""
    fits = input_size % _MULTIPLE == 0 and output_size % _MULTIPLE == 0
    return Fp8LinearMethod() if fits else LinearMethod()


class Fp8LinearMethod(LinearMethod):
    """``y = (x / s_x) (w / s_w)^T * s_x * s_w + b`` with a scale for each row of x and of w."""

    def create_weight(self, layer: LinearBase) -> None:
        layer.weight = layer.parameter(torch.empty(layer.output_size, layer.input_size, dtype=torch.float8_e4m3fn))
        # No checkpoint of the folder layout has it, so it is no part of the state.
        layer.register_buffer("weight_scale", torch.empty(1, layer.output_size, dtype=torch.float32), persistent=False)

    def store_weight(self, layer: LinearBase, loaded: torch.Tensor, first_row: int) -> None:
        values, scales = quantize_rows(loaded.to(layer.weight.device))
        rows = slice(first_row, first_row + loaded.shape[0])
        layer.weight.data[rows] = values
        layer.get_buffer("weight_scale")[:, rows] = scales.t()

    def apply(self, layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
        rows, scales = quantize_rows(x.flatten(0, -2))
        output = torch._scaled_mm(
            rows,
            layer.weight.t(),
            scale_a=scales,
            scale_b=layer.get_buffer("weight_scale"),
            bias=layer.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return output.unflatten(0, x.shape[:-1])


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[R, I] -> values [R, I] in FP8, scales [R, 1] in float32``; a row is its values times its scale."""
    if kernels.take(x):
        from vllm_omni.diffusion.layers.kernels import quantize

        output: tuple[torch.Tensor, torch.Tensor] = quantize.quantize_rows(x, None, False)
        return output
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST) / FP8_MAX
    return (x / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales
