"""Quantization of activations to FP8 (e4m3) with one scale per row, with what produces them before it.

Shapes: R rows, P and D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from vllm_omni.diffusion.layers.kernels.launch import block_of, traceable


@triton.jit
def _gelu_tanh(x):
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u), which is one exponential.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _quantize_rows(
    prefix,
    x,
    out,
    out_scale,
    prefix_stride: tl.constexpr,
    x_stride: tl.constexpr,
    prefix_width: tl.constexpr,
    width: tl.constexpr,
    PREFIX_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        values = _gelu_tanh(values)
    largest = tl.max(tl.abs(values), axis=0)
    if prefix_width > 0:
        prefix_columns = tl.arange(0, PREFIX_BLOCK)
        prefix_mask = prefix_columns < prefix_width
        first = tl.load(prefix + row * prefix_stride + prefix_columns, mask=prefix_mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(first), axis=0))
    row_scale = tl.maximum(largest, 1e-12) / 448.0
    tl.store(out_scale + row, row_scale)
    target = out + row * (prefix_width + width)
    if prefix_width > 0:
        first = tl.clamp(first / row_scale, -448.0, 448.0)
        tl.store(target + prefix_columns, first.to(out.dtype.element_ty), mask=prefix_mask)
    values = tl.clamp(values / row_scale, -448.0, 448.0)
    tl.store(target + prefix_width + columns, values.to(out.dtype.element_ty), mask=mask)


@triton_op("vllm_omni::quantize_rows", mutates_args=())
def quantize_rows(x: torch.Tensor, prefix: torch.Tensor | None, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [R, D], prefix [R, P] -> values [R, P + D] in FP8, scales [R, 1] in float32``.

    Each row of the result, times its scale, is the row of ``prefix`` and after it that of ``x``, or of its GELU (tanh
    approximation). Rows may lie apart in memory; the values of each lie together.
    """
    num_rows, width = x.shape
    prefix_width = 0 if prefix is None else prefix.shape[1]
    out = x.new_empty((num_rows, prefix_width + width), dtype=torch.float8_e4m3fn)
    out_scale = x.new_empty((num_rows, 1), dtype=torch.float32)
    block, num_warps = block_of(width)
    traceable(_quantize_rows)[(num_rows,)](
        x if prefix is None else prefix,
        x,
        out,
        out_scale,
        prefix_stride=0 if prefix is None else prefix.stride(0),
        x_stride=x.stride(0),
        prefix_width=prefix_width,
        width=width,
        PREFIX_BLOCK=triton.next_power_of_2(max(prefix_width, 1)),
        BLOCK=block,
        GELU=gelu,
        num_warps=num_warps,
    )
    return out, out_scale
