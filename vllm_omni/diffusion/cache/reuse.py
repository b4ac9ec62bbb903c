"""What all step caches share: the rows that compute go through the blocks, the others take what they remember.

Shapes: B rows of a forward, S tokens, E width of the model, ``...`` anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch

from vllm_omni.diffusion.distributed.collectives import all_reduce_sum
from vllm_omni.diffusion.distributed.groups import current_groups
from vllm_omni.diffusion.distributed.rank_status import waiting_for
from vllm_omni.diffusion.sequences import concatenate
from vllm_omni.diffusion.staged_forward import StagedForward, Streams, select_rows
from vllm_omni.diffusion.step_memory import ForwardRow


class StepCache(Protocol):
    """A rule by which rows skip blocks. It holds options alone: what it knows of a request is in the rows' memory."""

    def run(self, stages: StagedForward, rows: Sequence[ForwardRow], component: str) -> torch.Tensor:
        """The forward of the transformer named ``component``. Every row remembers, whether it computed or not."""
        ...


def changed_by(
    stages: StagedForward,
    streams: Streams,
    start: int,
    stop: int,
    updates: Sequence[Streams | None],
    form: Callable[[Streams], Streams],
) -> tuple[Streams, list[Streams]]:
    """The streams before block ``stop`` from those before block ``start``, and what blocks or ``updates`` added.

    Row i with ``updates[i]``, ``[1, ...]`` per stream, takes that; the rows without go through the blocks together.
    ``form`` picks from the streams before block ``stop`` what is needed from there on. A row's update covers that.
    """
    unchanged = form(stages.pass_by(streams, start, stop))
    computing = [row for row, update in enumerate(updates) if update is None]
    if len(computing) == len(updates):
        changed = form(stages.run_blocks(streams, stages.row_inputs, start, stop))
        added = tuple(new - old for new, old in zip(changed, unchanged, strict=True))
        return changed, [select_rows_of(added, [row]) for row in computing]
    results: list[Streams] = [()] * len(updates)
    added_rows: list[Streams] = [()] * len(updates)
    if computing:
        row_inputs = select_rows(stages.row_inputs, computing)
        computed = form(stages.run_blocks(select_rows_of(streams, computing), row_inputs, start, stop))
        for index, row in enumerate(computing):
            before = select_rows_of(unchanged, [row])
            results[row] = select_rows_of(computed, [index])
            added_rows[row] = tuple(new - old for new, old in zip(results[row], before, strict=True))
    for row, update in enumerate(updates):
        if update is not None:
            before = select_rows_of(unchanged, [row])
            added_rows[row] = tuple(_with_length(new, old) for new, old in zip(update, before, strict=True))
            results[row] = tuple(old + new for old, new in zip(before, added_rows[row], strict=True))
    return tuple(concatenate(parts) for parts in zip(*results, strict=True)), added_rows


def select_rows_of(streams: Streams, rows: Sequence[int]) -> Streams:
    """``[B, ...] each -> [len(rows), ...] each``."""
    return cast(Streams, select_rows(streams, rows))


def relative_changes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """The relative change of each row, from ``(new [1, ...], old [1, ...])``.

    That is the sum of absolute differences over the sum of absolute values of ``old``, in float32. The sums are over
    the tokens of all ranks that compute the rows together, so that all of them decide alike. This is the only time
    that a cache waits for the device in a forward.
    """
    if not pairs:
        return []
    sums = [
        torch.stack([(new - old).abs().sum(dtype=torch.float32), old.abs().sum(dtype=torch.float32)])
        for new, old in pairs
    ]
    changed, total = all_reduce_sum(torch.stack(sums), current_groups().forward).unbind(1)
    with waiting_for("device"):
        values: list[float] = (changed / total).tolist()
    return values


def _with_length(update: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """``[1, M, E]`` with the tokens of ``stream [1, S, E]``.

    A text is padded to the longest of its batch, which differs from step to step. What is cut off or filled up
    belongs to padding, which no token attends to.
    """
    missing = stream.shape[1] - update.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(update, (0, 0, 0, missing))
    return update[:, : stream.shape[1]] if missing < 0 else update
