"""The denoising loop: conditions that change with the step, and steps that fail."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_omni.diffusion.denoise import DenoiseState, denoise_step
from vllm_omni.diffusion.schedulers.unipc import UniPC


class Pipeline:
    """Predicts a number that its conditions name, and records what shared a forward."""

    sequence_conditions = {}

    def __init__(self):
        self.forwards = []

    def predict(self, latents, timestep, conditions):
        self.forwards.append((conditions["expert"], len(latents)))
        return torch.full_like(latents, {"high": 1.0, "low": 2.0}[conditions["expert"]])


def state(name, num_steps=4, sampler=None, **values):
    sigmas = torch.linspace(0.9, 0, num_steps + 1)
    half = num_steps // 2
    return DenoiseState(
        request_id=name,
        latents=torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(len(name))),
        sigmas=sigmas,
        timesteps=sigmas[:-1] * 1000,
        branches=({},),
        sampler=UniPC() if sampler is None else sampler,
        guidance=None,
        height=8,
        width=8,
        **{"step_conditions": ({"expert": "high"},) * half + ({"expert": "low"},) * (num_steps - half), **values},
    )


def test_requests_whose_step_conditions_differ_take_separate_forwards():
    pipeline, states = Pipeline(), [state("a", 2), state("bb", 4)]
    for _ in range(2):
        denoise_step(states, pipeline)
    assert pipeline.forwards == [("high", 2), ("low", 1), ("high", 1)]
    denoise_step(states[1:], pipeline)
    assert pipeline.forwards[-1] == ("low", 1)


def test_step_conditions_have_an_entry_for_every_step():
    with pytest.raises(AssertionError, match="one entry per step"):
        state("a", step_conditions=({"expert": "high"},))


@dataclass(frozen=True)
class Failing(UniPC):
    def step(self, latents, prediction, coefficients, history):
        raise RuntimeError("no memory")


def test_a_step_that_fails_leaves_every_request_as_it_was():
    pipeline = Pipeline()
    good, alone = state("a"), state("a")
    denoise_step([good], pipeline)
    denoise_step([alone], pipeline)
    bad = state("bb", sampler=Failing())
    latents, history = good.latents.clone(), {name: values.clone() for name, values in good.history.items()}
    with pytest.raises(RuntimeError, match="no memory"):
        denoise_step([good, bad], pipeline)
    assert good.step_index == 1
    assert torch.equal(good.latents, latents)
    assert all(torch.equal(values, history[name]) for name, values in good.history.items())
    denoise_step([good], pipeline)
    denoise_step([alone], pipeline)
    assert torch.equal(good.latents, alone.latents)
