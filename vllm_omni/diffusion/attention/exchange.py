"""What ranks of Ulysses exchange around an attention: tokens for heads, and back.

Ranks that reach each other's memory write to it; others go through NCCL or gloo.

Shapes: B batch, T text tokens that every rank has, S tokens of this rank, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vllm_omni.diffusion.distributed.collectives import all_to_all
from vllm_omni.diffusion.distributed.groups import RankGroup


def tokens_for_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_text: int,
    lengths: Sequence[int],
    heads: Sequence[int],
    kv_heads: Sequence[int],
    group: RankGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``query [B, T + S, H, D] -> [B, T + all tokens of the group, H of this rank, D]``; key and value likewise."""
    if group.size == 1:
        return query, key, value
    batch, _, _, head_size = query.shape
    own, num_tokens = lengths[group.rank], num_text + sum(lengths)
    widths = [(of_query, of_kv, of_kv) for of_query, of_kv in zip(heads, kv_heads, strict=True)]
    by_rank = list(zip(*(x.split([w[i] for w in widths], 2) for i, x in enumerate((query, key, value))), strict=True))
    # Tokens come first: what the ranks send is then one sequence, which attention reads as it lies.
    shapes = [(num_tokens, batch, sum(width), head_size) for width in widths]
    if group.peers is None:
        whole = query.new_empty(shapes[group.rank])
        sent_sizes = [own * batch * sum(width) * head_size for width in widths]
        sent = query.new_empty(sum(sent_sizes))
        targets = [part.view(own, batch, -1, head_size) for part in sent.split(sent_sizes)]
    else:
        buffer = group.peers.buffer("tokens", max(map(_numel, shapes)) * query.element_size())
        start = num_text + sum(lengths[: group.rank])
        wholes = [buffer.on(rank, shape, query.dtype) for rank, shape in enumerate(shapes)]
        whole, targets = wholes[group.rank], [x[start : start + own] for x in wholes]
    for target, parts in zip(targets, by_rank, strict=True):
        _join_heads(target, [x[:, num_text:] for x in parts], wide=group.peers is not None)
    _join_heads(whole[:num_text], [x[:, :num_text] for x in by_rank[group.rank]], wide=group.peers is not None)
    if group.peers is None:
        received_sizes = [length * _numel(shapes[group.rank][1:]) for length in lengths]
        all_to_all(sent, whole[num_text:], sent_sizes, received_sizes, group)
    else:
        buffer.barrier()
    split = whole.transpose(0, 1).split(widths[group.rank], dim=2)
    return split[0], split[1], split[2]


def heads_for_tokens(
    output: torch.Tensor, num_text: int, lengths: Sequence[int], heads: Sequence[int], group: RankGroup
) -> torch.Tensor:
    """``[B, T + all tokens of the group, H of this rank, D] -> [B, T + S, H, D]``."""
    if group.size == 1:
        return output
    batch, _, own_heads, head_size = output.shape
    text, *images = output.transpose(0, 1).split([num_text, *lengths])
    num_tokens = num_text + lengths[group.rank]
    if group.peers is None:
        sent = torch.cat([part for image in images for part in (text, image)])
        sent_sizes = [(num_text + length) * batch * own_heads * head_size for length in lengths]
        received_sizes = [num_tokens * batch * width * head_size for width in heads]
        received = output.new_empty(sum(received_sizes))
        all_to_all(sent, received, sent_sizes, received_sizes, group)
        parts = [part.view(num_tokens, batch, -1, head_size) for part in received.split(received_sizes)]
        return torch.cat([part.transpose(0, 1) for part in parts], dim=2)
    shapes = [(num_text + length, batch, sum(heads), head_size) for length in lengths]
    buffer = group.peers.buffer("heads", max(map(_numel, shapes)) * output.element_size())
    starts = list(itertools.accumulate(heads, initial=0))
    own = slice(starts[group.rank], starts[group.rank + 1])
    # A tensor of its own: the next exchange writes to the buffer.
    whole = output.new_empty(num_tokens, batch, sum(heads), head_size)
    for rank, (shape, image) in enumerate(zip(shapes, images, strict=True)):
        target = (whole if rank == group.rank else buffer.on(rank, shape, output.dtype))[:, :, own]
        _copy_rows(target[:num_text], text)
        _copy_rows(target[num_text:], image)
    buffer.barrier()
    came = buffer.on(group.rank, shapes[group.rank], output.dtype)
    for rank in range(group.size):
        if rank != group.rank:
            theirs = slice(starts[rank], starts[rank + 1])
            _copy_rows(whole[:, :, theirs], came[:, :, theirs])
    return whole.transpose(0, 1)


def _join_heads(target: torch.Tensor, parts: Sequence[torch.Tensor], *, wide: bool) -> None:
    """Copy ``[B, S, H_i, D]`` each into ``target [S, B, sum(H_i), D]``."""
    copy = _copy_rows if wide else torch.Tensor.copy_
    for x, place in zip(parts, target.split([x.shape[2] for x in parts], dim=2), strict=True):
        copy(place, x.transpose(0, 1))


def _copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` in units of 16 bytes where rows allow it; a copy of strided halves moves 2 at a time."""
    ratio = 16 // target.element_size()
    strides = (*target.stride()[:-1], *source.stride()[:-1], target.shape[-1])
    offsets = (target.storage_offset(), source.storage_offset())
    if all(number % ratio == 0 for number in (*strides, *offsets)) and target.stride(-1) == source.stride(-1) == 1:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
