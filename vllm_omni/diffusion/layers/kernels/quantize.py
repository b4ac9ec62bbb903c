"""Quantization of activations to FP8 (e4m3) with one scale per row, with what produces them before it.

Shapes: R rows, P and D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.operators import operator


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
    CHUNK: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    # The row stays in registers, in as many pieces as it takes: a block of a power of two would be a quarter empty.
    pieces = ()
    largest = tl.zeros((CHUNK,), dtype=tl.float32)
    for start in tl.static_range(0, prefix_width, CHUNK):
        piece = tl.load(
            prefix + row * prefix_stride + start + columns, mask=start + columns < prefix_width, other=0.0
        ).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(piece))
        pieces = pieces + (piece,)  # noqa: RUF005
    for start in tl.static_range(0, width, CHUNK):
        piece = tl.load(x + row * x_stride + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
        if GELU:
            piece = _gelu_tanh(piece)
        largest = tl.maximum(largest, tl.abs(piece))
        pieces = pieces + (piece,)  # noqa: RUF005
    row_scale = tl.maximum(tl.max(largest, axis=0), 1e-12) / 448.0
    tl.store(out_scale + row, row_scale)
    factor = 1.0 / row_scale
    target = out + row * (prefix_width + width)
    num_prefix: tl.constexpr = (prefix_width + CHUNK - 1) // CHUNK
    for index in tl.static_range(0, (prefix_width + CHUNK - 1) // CHUNK):
        values = tl.clamp(pieces[index] * factor, -448.0, 448.0).to(out.dtype.element_ty)
        tl.store(target + index * CHUNK + columns, values, mask=index * CHUNK + columns < prefix_width)
    for index in tl.static_range(0, (width + CHUNK - 1) // CHUNK):
        values = tl.clamp(pieces[num_prefix + index] * factor, -448.0, 448.0).to(out.dtype.element_ty)
        tl.store(target + prefix_width + index * CHUNK + columns, values, mask=index * CHUNK + columns < width)


def quantize_rows(x: torch.Tensor, prefix: torch.Tensor | None, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [R, D], prefix [R, P] -> values [R, P + D] in FP8, scales [R, 1] in float32``.

    Each row of the result, times its scale, is the row of ``prefix`` and after it that of ``x``, or of its GELU (tanh
    approximation). Rows may lie apart in memory; the values of each lie together.
    """
    out, out_scale = _outputs(x, prefix, gelu)
    prefix_width = 0 if prefix is None else prefix.shape[1]
    chunk = _chunk(x.shape[1])
    _quantize_rows[(x.shape[0],)](
        x if prefix is None else prefix,
        x,
        out,
        out_scale,
        prefix_stride=0 if prefix is None else prefix.stride(0),
        x_stride=x.stride(0),
        prefix_width=prefix_width,
        width=x.shape[1],
        CHUNK=chunk,
        GELU=gelu,
        num_warps=max(chunk // 256, 1),  # 8 values of each chunk per thread, which are 16 bytes
    )
    return out, out_scale


def _chunk(width: int) -> int:
    """4096 values at once, or fewer where that leaves less of the last chunk empty: a power of two."""
    sizes = [size for size in (4096, 2048, 1024, 512, 256) if size <= width] or [triton.next_power_of_2(width)]
    return min(sizes, key=lambda size: (round(-(-width // size) * size / width, 1), -size))


def _outputs(x: torch.Tensor, prefix: torch.Tensor | None, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[1] + (0 if prefix is None else prefix.shape[1])
    return (
        x.new_empty((x.shape[0], width), dtype=torch.float8_e4m3fn),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    )


quantize_rows_op = operator(quantize_rows, _outputs)
