"""Operators of torch that compiled code calls and does not look into.

Shapes: B rows, T and I tokens of two streams, S = T + I, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vllm_omni.diffusion.layers import kernels

_LIBRARY = torch.library.Library("vllm_omni", "FRAGMENT")


def operator(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``torch.ops.vllm_omni.<name of function>``; ``fake`` gives its outputs without values."""
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    # Without the layers of torch.library.custom_op: they take longer than starting a kernel.
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_omni::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vllm_omni, name)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether it pays to call these operators instead of the plain functions of torch."""
    return x.is_cuda


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x [..., K], weight [N, K], bias [N] -> GELU(x weight^T + bias) [..., N]``, tanh approximation.

    On a GPU cuBLAS computes GELU before it rounds and stores the product; a compiler would take that apart.
    """
    if not x.is_cuda:  # there torch's operator computes GELU without the approximation
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    output = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return output.unflatten(0, x.shape[:-1])


def linear_of_parts(
    first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``first [..., P], second [..., D], weight [N, P + D], bias [N] -> [first, second] weight^T + bias [..., N]``.

    The second product is added to the first in place; to join the inputs would copy both.
    """
    weights = weight.split([first.shape[-1], second.shape[-1]], dim=1)
    output = F.linear(first.flatten(0, -2), weights[0], bias)
    return output.addmm_(second.flatten(0, -2), weights[1].t()).unflatten(0, first.shape[:-1])


def joint_linear(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """``first [1, T, K], second [1, I, K], weights [N, K], biases [N] -> [1, S, N]``.

    Both products are written where they belong in the joint sequence; joining them afterwards would copy them.
    """
    output, parts = _joint(first, second, first_weight.shape[0], first.dtype)
    torch.addmm(first_bias, first[0], first_weight.t(), out=parts[0])
    torch.addmm(second_bias, second[0], second_weight.t(), out=parts[1])
    return output


def joint_scaled_linear(
    first: torch.Tensor,
    first_scale: torch.Tensor,
    first_weight: torch.Tensor,
    first_weight_scale: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_scale: torch.Tensor,
    second_weight: torch.Tensor,
    second_weight_scale: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """:func:`joint_linear` of FP8 inputs ``[1, T, K]`` with scales ``[T, 1]`` and weights with scales ``[1, N]``."""
    output, parts = _joint(first, second, first_weight.shape[0], first_bias.dtype)
    for x, x_scale, weight, weight_scale, bias, part in (
        (first, first_scale, first_weight, first_weight_scale, first_bias, parts[0]),
        (second, second_scale, second_weight, second_weight_scale, second_bias, parts[1]),
    ):
        _scaled_linear(x[0], x_scale, weight, weight_scale, bias, part)
    return output


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x weight^T * x_scale * weight_scale + bias``, ``[T, N]`` in ``dtype``.

    ``x [T, K], weight [N, K] in FP8, x_scale [T, 1], weight_scale [1, N] in float32, bias [N]``.
    """
    output = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    _scaled_linear(x, x_scale, weight, weight_scale, bias, output)
    return output


def _scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if kernels.take(x):
        from vllm_omni.diffusion.layers.kernels.split_sum import choose_tile, split_sum_linear

        tile = choose_tile(x.shape[0], weight.shape[0], weight.shape[1], x.device)
        if tile is not None:
            split_sum_linear(x, x_scale, weight, weight_scale, bias, out, tile)
            return
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )


def _joint(
    first: torch.Tensor, second: torch.Tensor, features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    num_first = first.shape[1]
    output = first.new_empty((1, num_first + second.shape[1], features), dtype=dtype)
    return output, (output[0, :num_first], output[0, num_first:])


linear_gelu_op = operator(linear_gelu, lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])))
linear_of_parts_op = operator(
    linear_of_parts, lambda first, second, weight, bias: first.new_empty((*first.shape[:-1], weight.shape[0]))
)
joint_linear_op = operator(
    joint_linear,
    lambda first, weight, bias, second, *_: _joint(first, second, weight.shape[0], first.dtype)[0],
)
joint_scaled_linear_op = operator(
    joint_scaled_linear,
    lambda first, scale, weight, weight_scale, bias, second, *_: _joint(first, second, weight.shape[0], bias.dtype)[0],
)
scaled_linear_op = operator(
    scaled_linear,
    lambda x, x_scale, weight, weight_scale, bias, dtype: x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype),
)
