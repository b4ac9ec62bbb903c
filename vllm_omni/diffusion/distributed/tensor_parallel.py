"""The place of this rank in its tensor-parallel group, which the linear layers shard by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorParallelRank:
    """Rank ``rank`` of ``size`` ranks that share each linear layer."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} must be at least 0 and less than size={self.size}")

    def divide(self, total: int, what: str) -> int:
        """This rank's part of ``total``. Raises ``ValueError`` if it does not divide evenly."""
        if total % self.size:
            divisors = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
            raise ValueError(
                f"{what}={total} does not divide by tensor_parallel_size={self.size}; these would: {divisors}"
            )
        return total // self.size

    def shard(self, tensor: torch.Tensor, dim: int, what: str) -> torch.Tensor:
        """This rank's slice of ``tensor`` along ``dim``; a view."""
        length = self.divide(tensor.shape[dim], what)
        return tensor.narrow(dim, self.rank * length, length)


SINGLE_RANK = TensorParallelRank()

_current: ContextVar[TensorParallelRank] = ContextVar("tensor_parallel_rank", default=SINGLE_RANK)


def current_tensor_parallel_rank() -> TensorParallelRank:
    """The rank that layers shard for unless they are told another."""
    return _current.get()


@contextmanager
def tensor_parallel_rank(rank: TensorParallelRank) -> Iterator[None]:
    """Layers that are built within the block shard for ``rank``."""
    token = _current.set(rank)
    try:
        yield
    finally:
        _current.reset(token)
