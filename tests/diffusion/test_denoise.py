"""The denoising loop: conditions that change with the step, steps that fail, and the plan that steps share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_omni.diffusion.denoise import DenoiseState, denoise_step
from vllm_omni.diffusion.guidance import Guidance, classifier_free
from vllm_omni.diffusion.schedulers.unipc import UniPC


class Pipeline:
    """Predicts a number that its conditions name, and records what shared a forward."""

    def __init__(self):
        self.forwards = []

    def predict(self, latents, timestep, conditions):
        self.forwards.append((conditions["expert"], len(latents)))
        return torch.full_like(latents, {"high": 1.0, "low": 2.0}[conditions["expert"]])


def state(name, num_steps=4, sampler=None, **values):
    sigmas = torch.linspace(0.9, 0, num_steps + 1)
    half = num_steps // 2
    defaults = {
        "branches": ({},),
        "step_conditions": ({"expert": "high"},) * half + ({"expert": "low"},) * (num_steps - half),
        "guidance": None,
    }
    return DenoiseState(
        request_id=name,
        latents=torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(len(name))),
        sigmas=sigmas,
        timesteps=sigmas[:-1] * 1000,
        sampler=UniPC() if sampler is None else sampler,
        height=8,
        width=8,
        **{**defaults, **values},
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


class TextPipeline:
    """Predicts from latents, timestep, a text of any length and its mask, so that every input counts."""

    sequence_conditions = {"text": "text_mask"}

    def predict(self, latents, timestep, conditions):
        text, mask = conditions.pop("text"), conditions.pop("text_mask")
        if mask is not None:
            text = text * mask.unsqueeze(-1)
        return latents * timestep.view(-1, 1, 1) / 1000 + text.sum(1, keepdim=True)


def with_texts(name, lengths, num_steps):
    texts = [torch.randn(1, length, 4, generator=torch.Generator().manual_seed(length)) for length in lengths]
    guidance = Guidance(scale=torch.linspace(2, 5, num_steps), combine=classifier_free)
    return state(
        name, num_steps, step_conditions=(), branches=tuple({"text": text} for text in texts), guidance=guidance
    )


def test_requests_that_join_and_leave_between_steps_get_what_they_get_alone():
    pipeline = TextPipeline()
    running = [with_texts("a", (3, 5), 4), with_texts("bb", (2, 7), 6)]
    joining, plan = with_texts("ccc", (9, 4), 3), None
    everyone = [*running, joining]
    for step in range(7):
        if step == 2:
            running.append(joining)
        running = [one for one in running if not one.is_done]
        if running:
            plan = denoise_step(running, pipeline, plan=plan)
    for one in everyone:
        alone = with_texts(one.request_id, [one.branches[b]["text"].shape[1] for b in (0, 1)], one.num_steps)
        while not alone.is_done:
            denoise_step([alone], pipeline)
        assert one.is_done
        torch.testing.assert_close(one.latents, alone.latents)


def test_a_plan_is_kept_while_the_same_requests_advance_together():
    pipeline, states = TextPipeline(), [with_texts("a", (3, 5), 4), with_texts("bb", (2, 7), 6)]
    plan = denoise_step(states, pipeline)
    assert denoise_step(states, pipeline, plan=plan) is plan
    assert denoise_step(states, pipeline, max_batch_size=2, plan=plan) is not plan


def leave(states):
    return states[:1]


def join(states):
    return [*states, with_texts("ccc", (9, 4), 3)]


def swap(states):
    return states[::-1]


def advance_one_alone(states):
    denoise_step(states[:1], TextPipeline())
    return states


def change_a_text(states):
    states[0].branches = with_texts("a", (8, 8), 4).branches
    return states


@pytest.mark.parametrize("change", [leave, join, swap, advance_one_alone, change_a_text])
def test_a_plan_is_made_anew_when_anything_about_the_requests_changes(change):
    pipeline, states = TextPipeline(), [with_texts("a", (3, 5), 4), with_texts("bb", (2, 7), 6)]
    plan = denoise_step(states, pipeline)
    assert denoise_step(change(states), pipeline, plan=plan) is not plan


def test_a_plan_is_kept_as_long_as_the_conditions_of_the_step_are_the_same_object():
    high, low = {"expert": "high"}, {"expert": "low"}
    pipeline, one = Pipeline(), state("a", 4, step_conditions=(high, high, low, low))
    plans = [denoise_step([one], pipeline)]
    while not one.is_done:
        plans.append(denoise_step([one], pipeline, plan=plans[-1]))
    assert plans[0] is plans[1]
    assert plans[1] is not plans[2]
    assert plans[2] is plans[3]
    assert pipeline.forwards == [("high", 1)] * 2 + [("low", 1)] * 2
