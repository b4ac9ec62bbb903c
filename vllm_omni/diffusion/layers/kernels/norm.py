"""Layer normalisation with modulation, and with the gated residual before it, in one pass over memory.

Shapes: ``...`` leading dimensions of R rows together, D features. Shift, scale and gate come for G consecutive groups
of rows (a batch, a frame, a token): R is a multiple of G. All is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.kernels.launch import block_of, rows_of
from vllm_omni.diffusion.layers.operators import operator


@triton.jit
def _normalized(x, width, eps, columns, mask):
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(mask, x - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)


@triton.jit
def _store_row(y, out, out_scale, row, width, columns, mask, QUANTIZE: tl.constexpr):
    if QUANTIZE:
        largest = tl.max(tl.abs(tl.where(mask, y, 0.0)), axis=0)
        row_scale = tl.maximum(largest, 1e-12) / 448.0
        tl.store(out_scale + row, row_scale)
        y = tl.clamp(y / row_scale, -448.0, 448.0)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_modulate(
    x,
    scale,
    shift,
    out,
    out_scale,
    rows_per_group,
    eps,
    scale_stride: tl.constexpr,
    shift_stride: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = row // rows_per_group
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    normalized = _normalized(values, width, eps, columns, mask)
    row_scale = tl.load(scale + group * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
    row_shift = tl.load(shift + group * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(normalized * (1.0 + row_scale) + row_shift, out, out_scale, row, width, columns, mask, QUANTIZE)


@triton.jit
def _gated_residual_norm_modulate(
    residual,
    gate,
    update,
    scale,
    shift,
    summed,
    out,
    out_scale,
    rows_per_group,
    eps,
    gate_stride: tl.constexpr,
    scale_stride: tl.constexpr,
    shift_stride: tl.constexpr,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = row // rows_per_group
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(residual + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    row_update = tl.load(update + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    row_gate = tl.load(gate + group * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    values = (values + row_gate * row_update).to(summed.dtype.element_ty)
    tl.store(summed + row * width + columns, values, mask=mask)
    # From the rounded sum, as whoever reads it again will see it.
    normalized = _normalized(values.to(tl.float32), width, eps, columns, mask)
    row_scale = tl.load(scale + group * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
    row_shift = tl.load(shift + group * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(normalized * (1.0 + row_scale) + row_shift, out, out_scale, row, width, columns, mask, QUANTIZE)


def layer_norm_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [..., D], scale and shift [G, D] -> normalised, times (1 + scale), plus shift [..., D], scales [..., 1]``.

    With ``quantize`` the first result is in FP8 and the second has the scale of each row in float32; without, the
    second is empty.
    """
    x = x.contiguous()
    out, out_scale = _outputs(x, quantize)
    num_rows, width = rows_of(x), x.shape[-1]
    block, num_warps = block_of(width)
    _layer_norm_modulate[(num_rows,)](
        x,
        scale,
        shift,
        out,
        out_scale,
        num_rows // scale.shape[0],
        eps,
        scale_stride=_stride(scale),
        shift_stride=_stride(shift),
        width=width,
        BLOCK=block,
        QUANTIZE=quantize,
        num_warps=num_warps,
    )
    return out, out_scale


def gated_residual_norm_modulate(
    residual: torch.Tensor,
    gate: torch.Tensor,
    update: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    quantize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``residual and update [..., D], gate, scale, shift [G, D] -> sum [..., D], modulated [..., D], scales [..., 1]``.

    The sum is ``residual + gate * update``; the other results are those of :func:`layer_norm_modulate` of it. Gate, or
    scale and shift, may be one row for all.
    """
    residual, update = residual.contiguous(), update.contiguous()
    out, out_scale = _outputs(residual, quantize)
    summed = torch.empty_like(residual)
    num_rows, width = rows_of(residual), residual.shape[-1]
    block, num_warps = block_of(width)
    _gated_residual_norm_modulate[(num_rows,)](
        residual,
        gate,
        update,
        scale,
        shift,
        summed,
        out,
        out_scale,
        num_rows // max(gate.shape[0], scale.shape[0]),
        eps,
        gate_stride=_stride(gate),
        scale_stride=_stride(scale),
        shift_stride=_stride(shift),
        width=width,
        BLOCK=block,
        QUANTIZE=quantize,
        num_warps=num_warps,
    )
    return summed, out, out_scale


def _outputs(x: torch.Tensor, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if quantize:
        return (
            torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format),
            x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((0,), dtype=torch.float32)


def _stride(by_group: torch.Tensor) -> int:
    """From one group's values to the next one's; 0 where all groups share them."""
    return by_group.stride(0) if by_group.shape[0] > 1 else 0


layer_norm_modulate_op = operator(layer_norm_modulate, lambda x, scale, shift, eps, quantize: _outputs(x, quantize))
gated_residual_norm_modulate_op = operator(
    gated_residual_norm_modulate,
    lambda residual, gate, update, scale, shift, eps, quantize: (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        *_outputs(residual, quantize),
    ),
)
