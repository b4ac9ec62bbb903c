"""How far the host runs ahead of the device, on a platform that tells when it is waited for."""

from __future__ import annotations

import itertools

import pytest

from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.diffusion.worker import model_runner


@pytest.mark.parametrize(
    ("long_step_s", "order"),
    [
        (0.0, ["queued 1", "done 1", "queued 2", "done 2", "queued 3", "done 3"]),
        (float("inf"), ["queued 1", "done 1", "queued 2", "queued 3", "done 2"]),
    ],
)
def test_nothing_is_queued_behind_a_long_step_and_one_step_behind_a_short_one(
    qwen_omni, monkeypatch, long_step_s, order
):
    """The first step is waited for in any case: nothing is known of it yet."""
    events, numbers = [], itertools.count(1)

    def record():
        number = next(numbers)
        events.append(f"queued {number}")
        return lambda: events.append(f"done {number}")

    runner = qwen_omni._engine._executor._worker._runner
    runner._steps_ahead.clear()
    monkeypatch.setattr(type(runner._platform), "record", lambda _: record())
    monkeypatch.setattr(model_runner, "_LONG_STEP_S", long_step_s)
    qwen_omni.generate("a cat", OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=3))
    runner._steps_ahead.clear()
    assert events == order
