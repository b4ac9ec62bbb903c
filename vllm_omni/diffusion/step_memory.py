"""What is remembered of a request between steps, and how a step cache learns whose rows a forward computes.

:func:`~vllm_omni.diffusion.denoise.denoise_step` names the rows of each forward by :func:`forward_rows`; a cache that
stands before a transformer reads them by :func:`current_forward_rows`. No model takes part in this.

Shapes: B rows of a forward, one per output of one branch of one request.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

# The transformer that a pipeline called, the branch, and the output within the request.
_RowKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class PreparedSteps:
    """Modulations ``[K, P]`` of steps ``first`` to ``first + K``, those of all blocks one after the other."""

    first: int
    values: torch.Tensor


@dataclass(slots=True)
class StepMemory:
    """The memory of one request. What a step learns is kept apart until the whole step succeeded."""

    num_forwards: int = 0  # rows that passed a cache, over all steps, branches and outputs
    num_skipped: int = 0  # those of them whose blocks were skipped
    modulations_bytes: int = 0  # of modulations, at their most
    # They follow from the request alone, so a step that failed leaves nothing wrong in them.
    _modulations: dict[Hashable, PreparedSteps] = field(default_factory=dict)
    _entries: dict[_RowKey, Any] = field(default_factory=dict)
    _pending: dict[_RowKey, tuple[Any, bool]] = field(default_factory=dict)

    def begin_step(self) -> None:
        """Forget what a step that failed has left."""
        self._pending.clear()

    def commit_step(self, is_last: bool = False) -> None:
        """Keep what the step learned. What it did not use, as of an expert that has had its steps, is let go.

        The last step leaves no modulations: decoding needs the memory.
        """
        if is_last:
            self._modulations.clear()
        self._entries = {key: entry for key, (entry, _) in self._pending.items()}
        self.num_forwards += len(self._pending)
        self.num_skipped += sum(skipped for _, skipped in self._pending.values())
        self._pending.clear()

    def modulations(self, key: Hashable, step_index: int) -> torch.Tensor | None:
        """Those of a step, ``[1, P]``, if they are prepared."""
        steps = self._modulations.get(key)
        if steps is None or not 0 <= step_index - steps.first < steps.values.shape[0]:
            return None
        return steps.values[step_index - steps.first].unsqueeze(0)

    def keep_modulations(self, key: Hashable, steps: PreparedSteps) -> None:
        """In the place of those of earlier steps."""
        self._modulations[key] = steps
        self.modulations_bytes = max(
            self.modulations_bytes, sum(kept.values.nbytes for kept in self._modulations.values())
        )

    def recall(self, key: _RowKey) -> Any:
        return self._entries.get(key)

    def remember(self, key: _RowKey, entry: Any, skipped: bool) -> None:
        assert key not in self._pending, f"{key[0]} ran twice on a row within one step; a step cache expects one run"
        self._pending[key] = (entry, skipped)


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """One row of a forward: an output of one branch of a request, at the request's own step."""

    memory: StepMemory
    branch: int
    output: int
    step_index: int
    num_steps: int
    timesteps: torch.Tensor | None  # [T] of all steps, in [0, 1000]; None if other conditions change with the step too

    @property
    def is_last_step(self) -> bool:
        return self.step_index == self.num_steps - 1

    def recall(self, component: str) -> Any:
        """What the last steps left here for the transformer of this name; None before the first."""
        return self.memory.recall((component, self.branch, self.output))

    def remember(self, component: str, entry: Any, *, skipped: bool) -> None:
        """Leave ``entry`` for the next step. The last step leaves nothing: decoding needs the memory."""
        self.memory.remember((component, self.branch, self.output), None if self.is_last_step else entry, skipped)


_ROWS: ContextVar[Sequence[ForwardRow] | None] = ContextVar("forward_rows", default=None)


@contextmanager
def forward_rows(rows: Sequence[ForwardRow]) -> Iterator[None]:
    """Within the context, a forward computes these rows, in this order."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def current_forward_rows() -> Sequence[ForwardRow] | None:
    """The rows of the forward in progress, or None where a transformer is called outside of a step."""
    return _ROWS.get()
