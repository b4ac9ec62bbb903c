"""TeaCache (arXiv:2411.19108): the blocks' contribution is reused while the timestep has changed their input little.

Shapes: B rows of a forward, ``...`` anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_omni.diffusion.cache.reuse import changed_by, relative_changes
from vllm_omni.diffusion.staged_forward import StagedForward, Streams
from vllm_omni.diffusion.step_memory import ForwardRow


@dataclass(frozen=True, slots=True)
class _Entry:
    modulated_input: torch.Tensor  # [1, ...], of the last step
    residual: Streams  # [1, ...], what the blocks added at the last computed step
    distance: float  # accumulated since then


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """Skips all blocks of a row until its accumulated distance reaches ``threshold``.

    The distance of a step is ``coefficients``, a polynomial, of the relative change of the modulated input. The first
    and the last step of a request are computed.
    """

    threshold: float
    coefficients: tuple[float, ...]  # the highest degree first

    def run(self, stages: StagedForward, rows: Sequence[ForwardRow], component: str) -> torch.Tensor:
        modulated_input = stages.modulated_input()
        entries: list[_Entry | None] = [row.recall(component) for row in rows]
        distances = self._distances(modulated_input, rows, entries)
        reused = [
            entry.residual if entry is not None and distance < self.threshold else None
            for entry, distance in zip(entries, distances, strict=True)
        ]
        (tokens,), added = changed_by(
            stages, stages.streams, 0, stages.num_blocks, reused, lambda streams: (stages.output_tokens(streams),)
        )
        for index, row in enumerate(rows):
            skipped = reused[index] is not None
            distance = distances[index] if skipped else 0.0
            row.remember(component, _Entry(modulated_input[index : index + 1], added[index], distance), skipped=skipped)
        return stages.finish(tokens, stages.row_inputs)

    def _distances(
        self, modulated_input: torch.Tensor, rows: Sequence[ForwardRow], entries: Sequence[_Entry | None]
    ) -> list[float]:
        """The accumulated distance of each row; infinite where it is computed whatever has changed."""
        known = {
            index: entry
            for index, (row, entry) in enumerate(zip(rows, entries, strict=True))
            if entry is not None and not row.is_last_step
        }
        changes = relative_changes(
            [(modulated_input[index : index + 1], entry.modulated_input) for index, entry in known.items()]
        )
        distances = [float("inf")] * len(rows)
        for (index, entry), change in zip(known.items(), changes, strict=True):
            distances[index] = entry.distance + self.distance(change)
        return distances

    def distance(self, change: float) -> float:
        """The polynomial of a relative change (Horner's rule).

        Below 0 it has left the range that it was fitted on. Its absolute value is taken there, so that a large change
        is never mistaken for none, and a threshold of 0 skips nothing.
        """
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return abs(value)
