"""Step masks: which steps are computed whatever has changed. Early steps matter most.

All but ``balanced`` are those of Cache-DiT. That one computes the last steps too, which make up for what was skipped
before, and every fourth in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from vllm_omni.diffusion.cache_config import StepMaskPolicy

_NUM_STEPS = 28  # of the runs below; those of other requests are stretched
# Lengths of runs of steps that compute and that may skip, in turns.
_RUNS: dict[StepMaskPolicy, tuple[int, ...]] = {
    "slow": (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "medium": (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "fast": (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "ultra": (4, 2, 1, 5, 1, 6, 1, 7, 1),
}


def computes_by_mask(policy: StepMaskPolicy, step_index: int, num_steps: int) -> bool:
    """Whether the mask of a request of ``num_steps`` steps has this step computed."""
    return step_mask(policy, num_steps)[step_index]


@functools.lru_cache(maxsize=64)
def step_mask(policy: StepMaskPolicy, num_steps: int) -> tuple[bool, ...]:
    """True for each step that is computed. The first and the last one are."""
    mask = _balanced(num_steps) if policy == "balanced" else _stretched(_RUNS[policy], num_steps)
    return (True, *mask[1:-1], True) if num_steps > 1 else (True,)


def _balanced(num_steps: int) -> list[bool]:
    first, last = round(5 * num_steps / _NUM_STEPS), round(3 * num_steps / _NUM_STEPS)
    return [not first <= step < num_steps - last or (step - first) % 4 == 2 for step in range(num_steps)]


def _stretched(runs: Sequence[int], num_steps: int) -> list[bool]:
    mask: list[bool] = []
    end = 0
    for index, length in enumerate(runs):
        end += length
        mask += [index % 2 == 0] * (round(end * num_steps / _NUM_STEPS) - len(mask))
    return mask
