"""Quantization of heads to FP8 (e4m3) with one scale per head and row of the batch, in two passes.

Shapes: B rows, S tokens, G heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.operators import operator

_TOKENS = 128  # of a program


@triton.jit
def _largest_of_heads(
    x, largest, num_tokens, batch_stride, token_stride, TOKENS: tl.constexpr, HEAD: tl.constexpr, SIZE: tl.constexpr
):
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = part * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
    features = tl.arange(0, SIZE)[None, :]
    place = row * batch_stride + tokens * token_stride + head * HEAD + features
    values = tl.load(x + place, mask=(tokens < num_tokens) & (features < HEAD), other=0.0).to(tl.float32)
    index = (row * tl.num_programs(1) + head) * tl.num_programs(0) + part
    tl.store(largest + index, tl.max(tl.max(tl.abs(values), axis=1), axis=0))


@triton.jit
def _quantize_heads(
    x,
    largest,
    out,
    scales,
    num_tokens,
    batch_stride,
    token_stride,
    TOKENS: tl.constexpr,
    HEAD: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_parts, num_heads = tl.num_programs(0), tl.num_programs(1)
    parts = tl.arange(0, PARTS)
    index = row * num_heads + head
    # The largest value of the head, from those of its parts.
    scale = tl.max(tl.load(largest + index * num_parts + parts, mask=parts < num_parts, other=0.0), axis=0)
    scale = tl.maximum(scale, 1e-12) / 448.0
    if part == 0:
        tl.store(scales + index, scale)
    tokens = part * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
    features = tl.arange(0, SIZE)[None, :]
    mask = (tokens < num_tokens) & (features < HEAD)
    place = row * batch_stride + tokens * token_stride + head * HEAD + features
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * (1.0 / scale)
    target = ((row * num_tokens + tokens) * num_heads + head) * HEAD + features
    tl.store(out + target, tl.clamp(values, -448.0, 448.0).to(out.dtype.element_ty), mask=mask)


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [B, S, G, D] -> values [B, S, G, D] in FP8, scales [B, G] in float32``; a head is its values times its scale.

    Tokens may lie apart in memory; the heads of each lie together.
    """
    batch, num_tokens, num_heads, head_size = x.shape
    assert x.stride()[2:] == (head_size, 1), "the heads of a token lie together"
    values, scales = _outputs(x)
    num_parts = triton.cdiv(num_tokens, _TOKENS)
    largest = x.new_empty((batch, num_heads, num_parts), dtype=torch.float32)
    grid = (num_parts, num_heads, batch)
    sizes = {"TOKENS": _TOKENS, "HEAD": head_size, "SIZE": triton.next_power_of_2(head_size), "num_warps": 8}
    strides = (num_tokens, x.stride(0), x.stride(1))
    _largest_of_heads[grid](x, largest, *strides, **sizes)
    _quantize_heads[grid](x, largest, values, scales, *strides, PARTS=triton.next_power_of_2(num_parts), **sizes)
    return values, scales


def _outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32),
    )


quantize_heads_op = operator(quantize_heads, _outputs)
