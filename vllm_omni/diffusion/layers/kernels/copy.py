"""Copies of rows of several tensors in one kernel, row by row in turn.

What goes to another GPU waits for the link, what stays waits for memory: side by side they take as long as the slower.

Shapes: S tokens, B rows of a batch, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MOST = 4  # tensors of one kernel


@triton.jit
def _copy_row(
    target, source, num_tokens, width, to_token, to_row, from_token, from_row, token, row, BLOCK: tl.constexpr
):
    if token < num_tokens:
        columns = tl.arange(0, BLOCK)
        mask = columns < width
        values = tl.load(source + token * from_token + row * from_row + columns, mask=mask)
        tl.store(target + token * to_token + row * to_row + columns, values, mask=mask)


@triton.jit
def _copy_in_turn(
    target_0, source_0, tokens_0, width_0, to_token_0, to_row_0, from_token_0, from_row_0,
    target_1, source_1, tokens_1, width_1, to_token_1, to_row_1, from_token_1, from_row_1,
    target_2, source_2, tokens_2, width_2, to_token_2, to_row_2, from_token_2, from_row_2,
    target_3, source_3, tokens_3, width_3, to_token_3, to_row_3, from_token_3, from_row_3,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0) % COUNT
    token, row = (tl.program_id(0) // COUNT).to(tl.int64), tl.program_id(1).to(tl.int64)
    if which == 0:
        _copy_row(
            target_0, source_0, tokens_0, width_0, to_token_0, to_row_0, from_token_0, from_row_0, token, row, BLOCK
        )  # fmt: skip
    elif which == 1:
        _copy_row(
            target_1, source_1, tokens_1, width_1, to_token_1, to_row_1, from_token_1, from_row_1, token, row, BLOCK
        )  # fmt: skip
    elif which == 2:
        _copy_row(
            target_2, source_2, tokens_2, width_2, to_token_2, to_row_2, from_token_2, from_row_2, token, row, BLOCK
        )  # fmt: skip
    else:
        _copy_row(
            target_3, source_3, tokens_3, width_3, to_token_3, to_row_3, from_token_3, from_row_3, token, row, BLOCK
        )  # fmt: skip


def takes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether :func:`copy_in_turn` can copy them: the heads of each token must lie together."""
    return len(pairs) <= MOST and all(x.stride()[2:] == (x.shape[3], 1) for pair in pairs for x in pair)


def copy_in_turn(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Each target ``[S_i, B, H_i, D]`` from its source, of the same shape and dtype."""
    arguments: list[torch.Tensor | int] = []
    for target, source in pairs:
        strides = (*target.stride()[:2], *source.stride()[:2])
        arguments += [target, source, target.shape[0], target.shape[2] * target.shape[3], *strides]
    for _ in range(MOST - len(pairs)):
        arguments += [*pairs[0], 0, 0, 0, 0, 0, 0]
    batch = pairs[0][0].shape[1]
    longest, widest = (max(target.shape[axis] for target, _ in pairs) for axis in (0, 2))
    block = triton.next_power_of_2(widest * pairs[0][0].shape[3])
    grid = (longest * len(pairs), batch)
    _copy_in_turn[grid](*arguments, COUNT=len(pairs), BLOCK=block, num_warps=4)
