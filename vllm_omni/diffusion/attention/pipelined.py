"""Ulysses in two halves of the heads: one half travels while the other is attended to.

Tensors are packed by this rank and copied to another one's memory by its copy engines, which leave the multiprocessors
to the attention. What stays exposed is the way of the first half there and of the second half back.

Shapes: B batch, T text tokens that every rank has, S tokens of this rank, H heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from vllm_omni.diffusion.attention.exchange import copy_rows, join_heads
from vllm_omni.diffusion.distributed.groups import RankGroup
from vllm_omni.diffusion.distributed.peer_memory import PeerBuffer

# ``query, key, value [B, tokens, H, D] -> [B, tokens, H, D]``
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_Copies = list[tuple[torch.Tensor, torch.Tensor]]  # to, from; both contiguous


def pipelined_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_text: int,
    lengths: Sequence[int],
    heads: Sequence[int],
    group: RankGroup,
    attend: Attend,
) -> torch.Tensor:
    """``[B, T + S, H, D]`` each ``-> [B, T + S, H, D]``; ``attend`` is given all tokens of some of this rank's heads.

    Every rank has at least two heads, and ``group.peers``.
    """
    exchange = _Exchange(query, num_text, lengths, heads, group)
    peers = exchange.peers
    first = exchange.pack(0, (query, key, value))
    exchange.send_beside(first)
    second = exchange.pack(1, (query, key, value))
    peers.join()
    exchange.tokens[0].barrier()
    exchange.send_beside(second)
    first_output = attend(*exchange.own_heads(0))
    peers.join()
    exchange.tokens[1].barrier()
    back = exchange.blocks(0, first_output)  # kept, as the others are, until they have been joined
    exchange.send_beside(back)
    second_output = attend(*exchange.own_heads(1))
    peers.join()
    for target, source in exchange.blocks(1, second_output):
        target.copy_(source)
    exchange.heads_buffer.barrier()
    return exchange.gathered((first_output, second_output))


class _Exchange:
    """Where everything lies in one exchange."""

    def __init__(
        self, query: torch.Tensor, num_text: int, lengths: Sequence[int], heads: Sequence[int], group: RankGroup
    ) -> None:
        assert group.peers is not None, "split_attention asks before it comes here"
        self.batch, _, self.num_heads, self.head_size = query.shape
        self.dtype, self.group, self.peers = query.dtype, group, group.peers
        self.num_text, self.lengths = num_text, lengths
        self.halves = [(count - count // 2, count // 2) for count in heads]
        self.num_tokens = num_text + sum(lengths)
        size = self.batch * self.head_size * query.element_size()
        self.tokens: list[PeerBuffer] = [
            self.peers.buffer(f"tokens {half}", self.num_tokens * 3 * max(of[half] for of in self.halves) * size)
            for half in (0, 1)
        ]
        self.heads_buffer = self.peers.buffer("heads", (num_text + max(lengths)) * self.num_heads * size)

    def pack(self, half: int, tensors: Sequence[torch.Tensor]) -> _Copies:
        """What goes to the other ranks. What is this rank's own is copied at once."""
        copies: _Copies = []
        start = self.num_text + sum(self.lengths[: self.group.rank])
        for rank, place in enumerate(self._head_slices(half)):
            there = self._whole(half, rank)
            target = there[start : start + self.lengths[self.group.rank]]
            if rank == self.group.rank:
                join_heads(there[: self.num_text], [x[:, : self.num_text, place] for x in tensors])
                packed = target
            else:
                packed = torch.empty_like(target)
                copies.append((target, packed))
            join_heads(packed, [x[:, self.num_text :, place] for x in tensors])
        return copies

    def own_heads(self, half: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of all tokens, as they have come in."""
        split = self._whole(half, self.group.rank).transpose(0, 1).chunk(3, dim=2)
        return split[0], split[1], split[2]

    def blocks(self, half: int, output: torch.Tensor) -> _Copies:
        """What goes back to the other ranks of ``output [B, tokens, H of this half, D]``."""
        copies: _Copies = []
        text, *images = output.transpose(0, 1).split([self.num_text, *self.lengths])
        text = text.contiguous()
        for rank, image in enumerate(images):
            if rank != self.group.rank:
                block = self._blocks(rank)[self.group.rank][half]
                copies += [(block[: self.num_text], text), (block[self.num_text :], image.contiguous())]
        return copies

    def gathered(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[B, T + S, H, D]``, a tensor of its own: the next exchange writes to the buffer."""
        own = self.lengths[self.group.rank]
        start = self.num_text + sum(self.lengths[: self.group.rank])
        whole = torch.empty(
            self.num_text + own, self.batch, self.num_heads, self.head_size, dtype=self.dtype, device=outputs[0].device
        )
        for half, output in enumerate(outputs):
            came = self._blocks(self.group.rank)
            for rank, place in enumerate(self._head_slices(half)):
                if rank == self.group.rank:
                    mine = output.transpose(0, 1)
                    copy_rows(whole[: self.num_text, :, place], mine[: self.num_text])
                    copy_rows(whole[self.num_text :, :, place], mine[start : start + own])
                else:
                    copy_rows(whole[:, :, place], came[rank][half])
        return whole.transpose(0, 1)

    def send_beside(self, copies: _Copies) -> None:
        with self.peers.beside():
            for target, source in copies:
                target.copy_(source)

    def _head_slices(self, half: int) -> list[slice]:
        """The heads of this half on each rank."""
        starts = itertools.accumulate((sum(of) for of in self.halves), initial=0)
        return [
            slice(start + half * of[0], start + of[0] + half * of[1])
            for start, of in zip(starts, self.halves, strict=False)
        ]

    def _whole(self, half: int, rank: int) -> torch.Tensor:
        """``[T + all tokens, B, 3 * H, D]`` of a rank."""
        shape = (self.num_tokens, self.batch, 3 * self.halves[rank][half], self.head_size)
        return self.tokens[half].on(rank, shape, self.dtype)

    def _blocks(self, rank: int) -> list[list[torch.Tensor]]:
        """What comes back to ``rank``, ``[T + S, B, H, D]`` from each rank and each half."""
        num_tokens = self.num_text + self.lengths[rank]
        width = self.batch * self.head_size
        flat = self.heads_buffer.on(rank, (num_tokens * self.num_heads * width,), self.dtype)
        sizes = [num_tokens * width * count for of in self.halves for count in of]
        blocks = [part.view(num_tokens, self.batch, -1, self.head_size) for part in flat.split(sizes)]
        return [blocks[2 * source : 2 * source + 2] for source in range(self.group.size)]
