"""A transformer's forward in three parts: before its blocks, the blocks, and after them.

A transformer describes its forward in this form once and runs it; a step cache runs the same description with some of
the rows or blocks left out.

Shapes: B rows, S tokens, E width of the model, ``...`` anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

# What the blocks transform, one tensor ``[B, S, E]`` per stream of tokens.
Streams = tuple[torch.Tensor, ...]
# What every block is given beside, ``[B, ...]`` each; None for what a forward does without.
RowInputs = tuple[torch.Tensor | None, ...]
# What they are given beside that is the same for all rows, as rotary angles are.
SharedInputs = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpan:
    """Consecutive blocks of one kind.

    ``call(block, streams, row_inputs, shared_inputs)`` runs one of them, and depends on no other tensor. ``enter``
    turns the streams of the kind before into those of this one, each row by itself. A stream that holds padding has it
    at its end, where a cache may cut it or add to it.
    """

    blocks: Sequence[nn.Module] | nn.ModuleList
    call: Callable[[nn.Module, Streams, RowInputs, SharedInputs], Streams]
    enter: Callable[[Streams], Streams] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What the modulations of all blocks are computed from, ``compute(timestep, *others) -> [B, E]``.

    Each row depends on its own row of ``timestep [B]`` and of ``others``, ``[B, ...]`` each, which are the same at all
    steps of a request. The timestep is :func:`~vllm_omni.diffusion.latents.unit_timestep` of the request's.
    """

    compute: Callable[..., torch.Tensor]
    others: RowInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedForward:
    """One forward, whose first part is done.

    ``modulated_input()`` is the signal of TeaCache, ``[B, ...]``: what the first block computes with, after its
    modulation. ``output_tokens(streams)`` are the tokens of the last streams that the last part needs, and
    ``finish(tokens, row_inputs)`` is that part. ``runner`` runs blocks in another way than one after the other.

    ``conditioning`` tells how the input of modulations, ``row_inputs[0]``, is made. Where that is a row of prepared
    modulations of all blocks instead, ``block_parts`` are the features that each block takes of it.
    """

    streams: Streams
    row_inputs: RowInputs
    spans: tuple[BlockSpan, ...]
    modulated_input: Callable[[], torch.Tensor]
    output_tokens: Callable[[Streams], torch.Tensor]
    finish: Callable[[torch.Tensor, RowInputs], torch.Tensor]
    shared_inputs: SharedInputs = ()
    conditioning: Conditioning | None = None
    block_parts: tuple[slice, ...] | None = None
    runner: Callable[[StagedForward, Streams, RowInputs, int, int], Streams] | None = None

    @property
    def num_blocks(self) -> int:
        return sum(len(span.blocks) for span in self.spans)

    def run(self) -> torch.Tensor:
        """The whole forward."""
        streams = self.run_blocks(self.streams, self.row_inputs, 0, self.num_blocks)
        return self.finish(self.output_tokens(streams), self.row_inputs)

    def run_blocks(self, streams: Streams, row_inputs: RowInputs, start: int, stop: int) -> Streams:
        """The streams before block ``stop``, from those before block ``start``, of any of the rows."""
        if self.runner is not None:
            return self.runner(self, streams, row_inputs, start, stop)
        index = start
        for span, first, last in self._spans(start, stop):
            if first == 0 and span.enter is not None:
                streams = span.enter(streams)
            for block in itertools.islice(span.blocks, first, last):
                streams = span.call(block, streams, self._row_inputs_of(index, row_inputs), self.shared_inputs)
                index += 1
        return streams

    def _row_inputs_of(self, index: int, row_inputs: RowInputs) -> RowInputs:
        """What block ``index`` is given."""
        if self.block_parts is None:
            return row_inputs
        prepared, *others = row_inputs
        assert prepared is not None, "it holds the parts"
        return (prepared[:, self.block_parts[index]], *others)

    def pass_by(self, streams: Streams, start: int, stop: int) -> Streams:
        """The same streams in the form that they have before block ``stop``, as if no block changed them."""
        for span, first, _ in self._spans(start, stop):
            if first == 0 and span.enter is not None:
                streams = span.enter(streams)
        return streams

    def _spans(self, start: int, stop: int) -> Iterator[tuple[BlockSpan, int, int]]:
        """Spans that hold blocks of ``start`` to ``stop``, and which of their own these are."""
        offset = 0
        for span in self.spans:
            first, last = max(start - offset, 0), min(stop - offset, len(span.blocks))
            if first < last:
                yield span, first, last
            offset += len(span.blocks)


def select_rows(tensors: Sequence[torch.Tensor | None], rows: Sequence[int]) -> tuple[torch.Tensor | None, ...]:
    """``[B, ...] each -> [len(rows), ...] each``."""
    return tuple(None if x is None else _select(x, rows) for x in tensors)


def _select(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    # Slices instead of an index: an index would have to travel to the device.
    parts = [x[row : row + 1] for row in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
