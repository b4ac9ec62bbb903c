"""Linear layers in FP8 (e4m3, arXiv:2209.05433): weights by output channel, activations by token.

A weight is quantized as it is loaded, tensor by tensor, so that no more than one of them is in memory in its own
precision. The scale of an activation is that of the token at hand: nothing is calibrated.

Shapes: R rows (tokens), I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_omni.diffusion.distributed.tensor_parallel import sum_over_ranks
from vllm_omni.diffusion.layers import kernels
from vllm_omni.diffusion.layers.linear import LinearBase
from vllm_omni.diffusion.layers.linear_method import LinearMethod, PendingInput
from vllm_omni.diffusion.layers.operators import joint_scaled_linear_op, on_gpu, scaled_linear, scaled_linear_op
from vllm_omni.diffusion.layers.peer_sums import sum_over_peers_op

FP8_MAX = 448.0  # the largest number of e4m3
_SMALLEST = 1e-12  # of a row of zeros
_MULTIPLE = 16  # of the features that the scaled product takes


def choose_fp8(input_size: int, output_size: int, weights_only: bool) -> LinearMethod:
    """FP8, or the plain method for a layer of a size that the scaled product does not take."""
    fits = input_size % _MULTIPLE == 0 and output_size % _MULTIPLE == 0
    if not fits:
        return LinearMethod()
    return Fp8WeightsLinearMethod() if weights_only else Fp8LinearMethod()


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

    def apply(self, layer: LinearBase, x: torch.Tensor | PendingInput) -> torch.Tensor:
        given = PendingInput(x) if isinstance(x, torch.Tensor) else x
        rows, scales = quantize_input(given)
        # Compiled code takes the operator as it is, and has torch's own product on a CPU.
        multiply = scaled_linear_op if on_gpu(rows) else scaled_linear
        output = multiply(rows, scales, layer.weight, layer.get_buffer("weight_scale"), layer.bias, given.x.dtype)
        return output.unflatten(0, given.x.shape[:-1])

    def apply_summed(self, layer: LinearBase, x: torch.Tensor | PendingInput) -> torch.Tensor:
        product = self.apply(layer, x)
        if layer.tp.peers is None:
            return sum_over_ranks(product, layer.tp)
        return sum_over_peers_op(product, layer.tp.name)

    def apply_both_summed(
        self, layer: LinearBase, x: torch.Tensor | PendingInput, other: LinearBase, y: torch.Tensor | PendingInput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.apply_summed(layer, x), self.apply_summed(other, y)

    def apply_gelu(self, layer: LinearBase, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, PendingInput]:
        output = self.apply(layer, x)
        return output[..., :start], PendingInput(output[..., start:], gelu=True)

    def apply_joint(self, layer: LinearBase, x: torch.Tensor, other: LinearBase, y: torch.Tensor) -> torch.Tensor:
        if not on_gpu(x) or x.shape[0] > 1 or layer.bias is None:
            return torch.cat([self.apply(layer, x), self.apply(other, y)], dim=1)
        arguments = []
        for each, tokens in ((layer, x), (other, y)):
            rows, scales = quantize_input(PendingInput(tokens))
            arguments += [rows.unsqueeze(0), scales, each.weight, each.get_buffer("weight_scale"), each.bias]
        output: torch.Tensor = joint_scaled_linear_op(*arguments)
        return output


class Fp8WeightsLinearMethod(Fp8LinearMethod):
    """``y = (x (w / s_w)^T) * s_w + b`` for few rows, whose activations keep their precision."""

    def apply(self, layer: LinearBase, x: torch.Tensor | PendingInput) -> torch.Tensor:
        given = x if isinstance(x, torch.Tensor) else x.joined()
        scale = layer.get_buffer("weight_scale")
        if kernels.take(given):
            from vllm_omni.diffusion.layers.kernels.few_rows import few_rows_linear_op

            rows: torch.Tensor = few_rows_linear_op(given.flatten(0, -2), layer.weight, scale, layer.bias)
            return rows.unflatten(0, given.shape[:-1])
        return F.linear(given, (layer.weight.float() * scale.t()).to(given.dtype), layer.bias)


def quantize_input(given: PendingInput) -> tuple[torch.Tensor, torch.Tensor]:
    """The input ``[..., I]`` of a layer as rows: ``values [R, I] in FP8, scales [R, 1] in float32``."""
    if kernels.take(given.x):
        from vllm_omni.diffusion.layers.kernels.quantize import quantize_rows_op

        prefix = None if given.prefix is None else given.prefix.flatten(0, -2)
        output: tuple[torch.Tensor, torch.Tensor] = quantize_rows_op(given.x.flatten(0, -2), prefix, given.gelu)
        return output
    return quantize_rows(given.joined().flatten(0, -2))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[R, I] -> values [R, I] in FP8, scales [R, 1] in float32``; a row is its values times its scale."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST) / FP8_MAX
    return (x / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales
