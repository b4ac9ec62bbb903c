"""What ranks exchange around an attention: tokens for heads (Ulysses), or keys and values from place to place (ring).

Ranks that reach each other's memory write to it; others go through NCCL or gloo.

Shapes: B batch, T text tokens that every rank has, S tokens of this rank, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from vllm_omni.diffusion.distributed.collectives import all_to_all
from vllm_omni.diffusion.distributed.groups import RankGroup
from vllm_omni.diffusion.distributed.rank_status import waiting_for

_Pair = tuple[torch.Tensor, torch.Tensor]


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
        _join_heads(target, [x[:, num_text:] for x in parts])
    _join_heads(whole[:num_text], [x[:, :num_text] for x in by_rank[group.rank]])
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


def pass_on(parts: _Pair, lengths: Sequence[int], longest: int, turn: int, group: RankGroup) -> Callable[[], _Pair]:
    """Send keys and values ``[B, S, H, D]`` to the next place while those of the place before come in.

    ``lengths`` are the tokens that go and that come, ``longest`` the most that a place has. What is returned waits,
    and gives what came.
    """
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    batch, _, num_heads, head_size = parts[0].shape
    sent = [x.contiguous() for x in parts]
    if group.peers is None:
        coming = [x.new_empty(batch, lengths[1], num_heads, head_size) for x in sent]
        operations = [dist.P2POp(dist.isend, x, group=group.process_group, group_peer=following) for x in sent]
        operations += [dist.P2POp(dist.irecv, x, group=group.process_group, group_peer=before) for x in coming]
        requests = dist.batch_isend_irecv(operations)

        def received() -> _Pair:
            with waiting_for("ranks"):
                for request in requests:
                    request.wait()
            sent.clear()  # until here they must not be freed
            return coming[0], coming[1]

        return received
    # Two buffers in turn: one is read while the other is written.
    num_bytes = 2 * batch * longest * num_heads * head_size * sent[0].element_size()
    buffer = group.peers.buffer(f"ring {turn % 2}", num_bytes)
    target = buffer.on(following, (2, batch, lengths[0], num_heads, head_size), sent[0].dtype)
    own = buffer.on(group.rank, (2, batch, lengths[1], num_heads, head_size), sent[0].dtype)
    if turn == 0:
        buffer.barrier()  # the next place has read what came in the layer before
    with group.peers.beside():
        for x, place in zip(sent, target, strict=True):
            place.copy_(x)

    def written() -> _Pair:
        assert group.peers is not None, "it was there when this function was made"
        group.peers.join()
        sent.clear()  # until here they must not be freed
        buffer.barrier()
        return own[0], own[1]

    return written


def _join_heads(target: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy ``[B, S, H_i, D]`` each into ``target [S, B, sum(H_i), D]``."""
    for x, place in zip(parts, target.split([x.shape[2] for x in parts], dim=2), strict=True):
        _copy_rows(place, x.transpose(0, 1))


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
