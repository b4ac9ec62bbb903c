"""Attention over the keys of two places, merged (arXiv:2205.14135, section 3.1).

Shapes: B batch, S query tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _merge_attention(
    first,
    second,
    first_lse,
    second_lse,
    out,
    num_rows,
    num_tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    is_row = rows < num_rows
    token, head = rows // HEADS, rows % HEADS
    # Scores have their heads before their tokens.
    place = (token // num_tokens * HEADS + head) * num_tokens + token % num_tokens
    difference = tl.load(second_lse + place, mask=is_row, other=0.0) - tl.load(
        first_lse + place, mask=is_row, other=0.0
    )
    share = tl.sigmoid(difference)[:, None]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    mask = is_row[:, None] & (columns < WIDTH)[None, :]
    one = tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(second + offsets, mask=mask, other=0.0).to(tl.float32)
    merged = one + share * (other - one)
    tl.store(out + offsets, merged.to(out.dtype.element_ty), mask=mask)


def merge_attention(
    first: torch.Tensor,
    second: torch.Tensor,
    first_lse: torch.Tensor,
    second_lse: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``outputs [B, S, H, D], log-sum-exps [B, H, S] in float32 -> [B, S, H, D]`` in ``dtype``, all contiguous."""
    out = torch.empty_like(first, dtype=dtype)
    num_rows, rows = first.numel() // first.shape[3], 16
    _merge_attention[(triton.cdiv(num_rows, rows),)](
        first,
        second,
        first_lse,
        second_lse,
        out,
        num_rows,
        first.shape[1],
        HEADS=first.shape[2],
        WIDTH=first.shape[3],
        CHUNK=triton.next_power_of_2(first.shape[3]),
        ROWS=rows,
    )
    return out
