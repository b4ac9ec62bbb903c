"""DBCache of Cache-DiT (https://github.com/vipshop/cache-dit), with TaylorSeer and step masks.

The first blocks of a forward are computed, and what they add tells whether the middle ones would add what they added
before.

Shapes: B rows of a forward, ``...`` anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_omni.diffusion.cache.reuse import changed_by, relative_changes
from vllm_omni.diffusion.cache.step_mask import computes_by_mask
from vllm_omni.diffusion.cache_config import CacheDiTConfig
from vllm_omni.diffusion.staged_forward import StagedForward, Streams
from vllm_omni.diffusion.step_memory import ForwardRow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    first: torch.Tensor  # [1, ...], what the first blocks added at the last computed step
    middle: Streams  # [1, ...], what the middle blocks added then
    slope: Streams | None  # [1, ...], its change per step; None after one computed step
    computed_step: int
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0


@dataclass(frozen=True)
class DBCache:
    """Skips the middle blocks of a row by the rule of its options."""

    config: CacheDiTConfig

    def run(self, stages: StagedForward, rows: Sequence[ForwardRow], component: str) -> torch.Tensor:
        config = self.config
        start, stop = config.Fn_compute_blocks, stages.num_blocks - config.Bn_compute_blocks
        streams = stages.run_blocks(stages.streams, stages.row_inputs, 0, start)
        first = streams[0] - stages.pass_by(stages.streams, 0, start)[0]
        entries: list[_Entry | None] = [row.recall(component) for row in rows]
        reused = self._reused(first, rows, entries)

        def form(streams: Streams) -> Streams:
            return streams if config.Bn_compute_blocks else (stages.output_tokens(streams),)

        streams, added = changed_by(stages, streams, start, stop, reused, form)
        for index, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            skipped = reused[index] is not None
            if entry is not None and skipped:
                kept = _after_skip(entry)
            else:
                kept = self._after_computing(entry, row, first[index : index + 1], added[index])
            row.remember(component, kept, skipped=skipped)
        if config.Bn_compute_blocks:
            streams = stages.run_blocks(streams, stages.row_inputs, stop, stages.num_blocks)
            return stages.finish(stages.output_tokens(streams), stages.row_inputs)
        return stages.finish(streams[0], stages.row_inputs)

    def _reused(
        self, first: torch.Tensor, rows: Sequence[ForwardRow], entries: Sequence[_Entry | None]
    ) -> list[Streams | None]:
        """What each row takes in place of its middle blocks; None for those that compute."""
        may_skip = {
            index: entry
            for index, (row, entry) in enumerate(zip(rows, entries, strict=True))
            if entry is not None and self._may_skip(row, entry) and entry.first.shape[1:] == first.shape[1:]
        }
        if self.config.scm_steps_policy == "dynamic":
            changes = relative_changes([(first[index : index + 1], entry.first) for index, entry in may_skip.items()])
            may_skip = {
                index: entry
                for (index, entry), change in zip(may_skip.items(), changes, strict=True)
                if change < self.config.residual_diff_threshold
            }
        return [self._forecast(may_skip.get(index), row) for index, row in enumerate(rows)]

    def _may_skip(self, row: ForwardRow, entry: _Entry) -> bool:
        """Whether the limits allow a row to skip, whatever has changed."""
        config = self.config
        policy = config.scm_steps_mask_policy
        if row.step_index < config.max_warmup_steps:
            return False
        if policy is not None and computes_by_mask(policy, row.step_index, row.num_steps):
            return False
        return all(
            limit < 0 or count < limit
            for limit, count in (
                (config.max_cached_steps, entry.num_skipped),
                (config.max_continuous_cached_steps, entry.num_skipped_in_a_row),
            )
        )

    def _forecast(self, entry: _Entry | None, row: ForwardRow) -> Streams | None:
        if entry is None or entry.slope is None:
            return None if entry is None else entry.middle
        num_steps = row.step_index - entry.computed_step
        return tuple(value + num_steps * slope for value, slope in zip(entry.middle, entry.slope, strict=True))

    def _after_computing(self, entry: _Entry | None, row: ForwardRow, first: torch.Tensor, middle: Streams) -> _Entry:
        slope = None
        if self.config.enable_taylorseer and entry is not None and _shapes(entry.middle) == _shapes(middle):
            num_steps = row.step_index - entry.computed_step
            slope = tuple((new - old) / num_steps for new, old in zip(middle, entry.middle, strict=True))
        num_skipped = 0 if entry is None else entry.num_skipped
        return _Entry(first=first, middle=middle, slope=slope, computed_step=row.step_index, num_skipped=num_skipped)


def _after_skip(entry: _Entry) -> _Entry:
    return dataclasses.replace(
        entry, num_skipped=entry.num_skipped + 1, num_skipped_in_a_row=entry.num_skipped_in_a_row + 1
    )


def _shapes(streams: Streams) -> list[torch.Size]:
    return [stream.shape for stream in streams]
