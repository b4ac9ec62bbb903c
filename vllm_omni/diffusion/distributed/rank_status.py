"""What a rank waits for, which tells a rank that hangs from one that waits for it, and what not all do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

# A "compiler" works in processes of its own for a while. "compiled" code may wait for ranks, which it cannot say.
Wait = Literal["ranks", "device", "compiler", "compiled"]


@dataclass(slots=True)
class RankStatus:
    """Written by the thread that computes, read by the one that reports to the engine."""

    waiting_for: Wait | None = None
    num_changes: int = 0  # of it
    is_alone: bool = False  # at work in which not every rank has a part


_current: ContextVar[RankStatus | None] = ContextVar("rank_status", default=None)


@contextmanager
def rank_status(status: RankStatus) -> Iterator[None]:
    """Waits within the block are noted in ``status``."""
    token = _current.set(status)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def waiting_for(what: Wait) -> Iterator[None]:
    """What the block waits for, if anything in it does not compute."""
    status = _current.get()
    if status is None:
        yield
        return
    # Counted first: who reads the count last has seen no later wait than it tells of.
    status.num_changes += 1
    previous, status.waiting_for = status.waiting_for, what
    try:
        yield
    finally:
        status.num_changes += 1
        status.waiting_for = previous


@contextmanager
def working_alone() -> Iterator[None]:
    """Not every rank has a part in the block: those that have none are done before, however long it takes."""
    status = _current.get()
    if status is None:
        yield
        return
    status.is_alone = True
    try:
        yield
    finally:
        status.is_alone = False
