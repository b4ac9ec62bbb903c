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
from vllm_omni.diffusion.layers import kernels


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
    widths = [(of_query, of_kv, of_kv) for of_query, of_kv in zip(heads, kv_heads, strict=True)]
    by_rank = list(zip(*(x.split([w[i] for w in widths], 2) for i, x in enumerate((query, key, value))), strict=True))
    # Tokens come first: what the ranks send is then one sequence, which attention reads as it lies.
    shapes = [torch.Size((num_text + sum(lengths), batch, sum(width), head_size)) for width in widths]
    gather = _tokens_by_collective if group.peers is None else _tokens_by_peers
    split = gather(by_rank, num_text, lengths, shapes, group).transpose(0, 1).split(widths[group.rank], dim=2)
    return split[0], split[1], split[2]


def heads_for_tokens(
    output: torch.Tensor, num_text: int, lengths: Sequence[int], heads: Sequence[int], group: RankGroup
) -> torch.Tensor:
    """``[B, T + all tokens of the group, H of this rank, D] -> [B, T + S, H, D]``."""
    if group.size == 1:
        return output
    text, *images = output.transpose(0, 1).split([num_text, *lengths])
    gather = _heads_by_collective if group.peers is None else _heads_by_peers
    return gather(text, images, heads, group).transpose(0, 1)


def _tokens_by_collective(
    by_rank: Sequence[Sequence[torch.Tensor]],
    num_text: int,
    lengths: Sequence[int],
    shapes: Sequence[torch.Size],
    group: RankGroup,
) -> torch.Tensor:
    """All tokens of this rank's heads, ``shapes[rank]``, from the tensors ``[B, T + S, H_i, D]`` for each rank."""
    own = lengths[group.rank]
    whole = by_rank[0][0].new_empty(shapes[group.rank])
    sent_sizes = [own * shape[1:].numel() for shape in shapes]
    sent = whole.new_empty(sum(sent_sizes))
    for part, parts, shape in zip(sent.split(sent_sizes), by_rank, shapes, strict=True):
        _join_heads(part.view(own, *shape[1:]), [x[:, num_text:] for x in parts])
    _join_heads(whole[:num_text], [x[:, :num_text] for x in by_rank[group.rank]])
    received_sizes = [length * shapes[group.rank][1:].numel() for length in lengths]
    all_to_all(sent, whole[num_text:], sent_sizes, received_sizes, group)
    return whole


def _tokens_by_peers(
    by_rank: Sequence[Sequence[torch.Tensor]],
    num_text: int,
    lengths: Sequence[int],
    shapes: Sequence[torch.Size],
    group: RankGroup,
) -> torch.Tensor:
    """What :func:`_tokens_by_collective` returns, in a buffer that the next exchange writes to."""
    assert group.peers is not None
    dtype, size = by_rank[0][0].dtype, by_rank[0][0].element_size()
    buffer = group.peers.buffer("tokens", max(shape.numel() for shape in shapes) * size)
    wholes = [buffer.on(rank, shape, dtype) for rank, shape in enumerate(shapes)]
    start = num_text + sum(lengths[: group.rank])
    for index in range(3):  # queries, keys, values
        pairs = []
        for rank, (whole, parts) in enumerate(zip(wholes, by_rank, strict=True)):
            place, part = whole.split([x.shape[2] for x in parts], dim=2)[index], parts[index].transpose(0, 1)
            pairs.append((place[start : start + lengths[group.rank]], part[num_text:]))
            if rank == group.rank:
                pairs.append((place[:num_text], part[:num_text]))
        _copy_all(pairs)
    buffer.barrier()
    return wholes[group.rank]


def _heads_by_collective(
    text: torch.Tensor, images: Sequence[torch.Tensor], heads: Sequence[int], group: RankGroup
) -> torch.Tensor:
    """``[T + S, B, H, D]`` from this rank's heads of the text ``[T, B, H_rank, D]`` and of each rank's image tokens."""
    _, batch, own_heads, head_size = text.shape
    lengths = [text.shape[0] + image.shape[0] for image in images]
    sent = torch.cat([part for image in images for part in (text, image)])
    sent_sizes = [length * batch * own_heads * head_size for length in lengths]
    received_sizes = [lengths[group.rank] * batch * width * head_size for width in heads]
    received = text.new_empty(sum(received_sizes))
    all_to_all(sent, received, sent_sizes, received_sizes, group)
    parts = received.split(received_sizes)
    return torch.cat([part.view(lengths[group.rank], batch, -1, head_size) for part in parts], dim=2)


def _heads_by_peers(
    text: torch.Tensor, images: Sequence[torch.Tensor], heads: Sequence[int], group: RankGroup
) -> torch.Tensor:
    """What :func:`_heads_by_collective` returns."""
    assert group.peers is not None
    num_text, batch, _, head_size = text.shape
    shapes = [torch.Size((num_text + image.shape[0], batch, sum(heads), head_size)) for image in images]
    buffer = group.peers.buffer("heads", max(shape.numel() for shape in shapes) * text.element_size())
    starts = list(itertools.accumulate(heads, initial=0))
    of_rank = [slice(*pair) for pair in itertools.pairwise(starts)]
    # A tensor of its own: the next exchange writes to the buffer.
    whole = text.new_empty(shapes[group.rank])
    pairs = []
    for rank, (shape, image) in enumerate(zip(shapes, images, strict=True)):
        target = (whole if rank == group.rank else buffer.on(rank, shape, text.dtype))[:, :, of_rank[group.rank]]
        pairs += [(target[num_text:], image), (target[:num_text], text)]
    _copy_all(pairs)
    buffer.barrier()
    came = buffer.on(group.rank, shapes[group.rank], text.dtype)
    for rank, theirs in enumerate(of_rank):
        if rank != group.rank:
            copy_rows(whole[:, :, theirs], came[:, :, theirs])
    return whole


def _join_heads(target: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy ``[B, S, H_i, D]`` each into ``target [S, B, sum(H_i), D]``."""
    for x, place in zip(parts, target.split([x.shape[2] for x in parts], dim=2), strict=True):
        copy_rows(place, x.transpose(0, 1))


def _copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each ``[S_i, B, H_i, D]`` to its target."""
    pairs = [pair for pair in pairs if pair[0].numel()]
    if pairs and kernels.take(pairs[0][0]):
        from vllm_omni.diffusion.layers.kernels.copy import copy_in_turn, takes

        if takes(pairs):
            copy_in_turn(pairs)
            return
    for target, source in pairs:
        copy_rows(target, source)


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` in units of 16 bytes where rows allow it; a copy of strided halves moves 2 at a time."""
    ratio = 16 // target.element_size()
    strides = (*target.stride()[:-1], *source.stride()[:-1], target.shape[-1])
    offsets = (target.storage_offset(), source.storage_offset())
    if all(number % ratio == 0 for number in (*strides, *offsets)) and target.stride(-1) == source.stride(-1) == 1:
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)
