"""Sequence parallelism: which tensors of a transformer are split by tokens, and where they are whole again.

A transformer declares it in ``_sp_plan``; nothing in its code knows of ranks::

    _sp_plan = {
        "img_in": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "pos_embed": {0: SequenceParallelPartialInput(split_dim=0, text_len_source="num_text", split_output=True)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

Keys name modules: ``""`` is the transformer, ``"blocks.*"`` every block of a list. Keys of the inner dict name
parameters of the module's forward, or count its outputs where ``split_output`` is set. A forward splits one sequence;
text that goes with it is on every rank, before the sequence. Lengths need not divide: the first ranks have one token
more, and nothing is padded. A sequence of fewer tokens than ranks is not split: each computes it as a whole.

Shapes: S tokens of the sequence, P ranks, ``...`` anything.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Union

import torch

from vllm_omni.diffusion.distributed.collectives import all_gather_along
from vllm_omni.diffusion.distributed.groups import ParallelGroups, RankGroup
from vllm_omni.errors import InvalidConfigError

PLAN_OPTION = "ulysses_degree"  # that errors of a plan name; a ring needs the same plan


@dataclass(frozen=True)
class SequenceParallelInput:
    """A tensor that is split along ``split_dim``, an argument of the module or, with ``split_output``, an output of it.

    ``expected_dims`` is how many dimensions it has; another number is an error. Lengths that do not divide are split
    unevenly, so that ``auto_pad`` has nothing to do.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False


@dataclass(frozen=True)
class SequenceParallelPartialInput:
    """As :class:`SequenceParallelInput`, for a tensor that begins with text tokens, which every rank keeps.

    ``text_len_source`` is their number, or the name of a parameter of the module's or the transformer's forward: the
    number itself, or a tensor with the text tokens along its second dimension (its first if it has two or fewer).
    """

    split_dim: int
    text_len_source: str | int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class SequenceParallelOutput:
    """An output of the module that is put together again along ``gather_dim``."""

    gather_dim: int
    expected_dims: int | None = None


SplitEntry = Union[SequenceParallelInput, SequenceParallelPartialInput]
ModulePlan = Union[Mapping[Any, SplitEntry], SequenceParallelOutput, Sequence[SequenceParallelOutput]]
SequenceParallelPlan = Mapping[str, ModulePlan]


def plan_error(what: str) -> InvalidConfigError:
    """What is wrong with the plan of a transformer, as its forward shows."""
    return InvalidConfigError(f"_sp_plan: {what}", option=PLAN_OPTION)


@functools.lru_cache(maxsize=256)
def shard_lengths(total: int, num_ranks: int) -> tuple[int, ...]:
    """``total`` tokens over ranks, the first of which take one more where it does not divide."""
    quotient, remainder = divmod(total, num_ranks)
    return tuple(quotient + (rank < remainder) for rank in range(num_ranks))


class ShardedForward:
    """What one forward of a transformer has split so far.

    ``arguments`` are those of the forward, by name. Attention adds the backends that it ran to ``used_backends``.
    """

    def __init__(self, groups: ParallelGroups, arguments: Mapping[str, Any], used_backends: set[str]) -> None:
        self.groups = groups
        self.arguments = arguments
        self.used_backends = used_backends
        self.total: int | None = None  # S, once a sequence is split
        self.is_short = False  # fewer tokens than ranks

    @property
    def group(self) -> RankGroup:
        """The ranks that split the sequence."""
        return self.groups.sequence

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        assert self.total is not None, "a sequence was split before its lengths are asked for"
        return shard_lengths(self.total, self.group.size)

    @property
    def bounds(self) -> tuple[int, int]:
        """This rank's tokens of the sequence."""
        start = sum(self.lengths[: self.group.rank])
        return start, start + self.lengths[self.group.rank]

    def split(self, x: torch.Tensor, dim: int, name: str) -> torch.Tensor:
        """``[..., S, ...] -> [..., S_rank, ...]``.

        A tensor of length 1 is left as it is. One of length G, where G divides S, holds a value for each of G equal
        runs of tokens: it comes back with one for each run of this rank, all of the same length again.
        """
        length = x.shape[dim]
        if length == 1 or self.is_short:
            return x
        if self.total is None:
            if length < self.group.size:
                self.is_short = True
                return x
            self.total = length
        start, stop = self.bounds
        if length == self.total:
            return x.narrow(dim, start, stop - start)
        if self.total % length:
            raise plan_error(
                f"{name} has length {length} along dimension {dim}; the sequence that this forward has split has"
                f" {self.total} tokens, and a forward splits one"
            )
        run = self.total // length
        # The same on every rank, so that means over these tensors weigh all tokens alike.
        common = math.gcd(run, *itertools.accumulate(self.lengths))
        first = start // run
        covering = x.narrow(dim, first, math.ceil(stop / run) - first)
        parts = covering.repeat_interleave(run // common, dim)
        return parts.narrow(dim, (start - first * run) // common, (stop - start) // common)

    def split_after_text(self, x: torch.Tensor, dim: int, num_text: int, name: str) -> torch.Tensor:
        """``[..., T + S, ...] -> [..., T + S_rank, ...]``."""
        if not 0 <= num_text <= x.shape[dim]:
            raise plan_error(f"{name} has length {x.shape[dim]} along dimension {dim}, of which {num_text} are text")
        text, image = x.narrow(dim, 0, num_text), x.narrow(dim, num_text, x.shape[dim] - num_text)
        return torch.cat([text, self.split(image, dim, name)], dim)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``[..., S_rank, ...] -> [..., S, ...]``."""
        if self.total is None:
            return x
        return all_gather_along(x, dim, self.lengths, self.group)


_current: ContextVar[ShardedForward | None] = ContextVar("sharded_forward", default=None)


@contextmanager
def sharded_forward(forward: ShardedForward) -> Iterator[None]:
    """Within the block, ``forward`` is the one in progress."""
    token = _current.set(forward)
    try:
        yield
    finally:
        _current.reset(token)


def forward_in_progress() -> ShardedForward | None:
    """The forward whose plan is being carried out; None outside of one."""
    return _current.get()


def current_sharded_forward() -> ShardedForward | None:
    """The forward in progress if it has split a sequence by now, else None."""
    forward = _current.get()
    return None if forward is None or forward.total is None else forward
