"""UniPC against diffusers' scheduler, and rows of one call at different steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.unipc import UniPC, check_unipc_config, unipc_schedule
from vllm_omni.errors import InvalidModelFolderError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

CONFIG = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHAPE = (1, 2, 3, 4)


def schedule(config=CONFIG, **params):
    request = OmniDiffusionRequest(prompts=[{}], sampling_params=OmniDiffusionSamplingParams(**params))
    return unipc_schedule(request, config)


def velocity(latents, step):
    """Stands for a model: it depends on the latents and on the step."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + step))
    return torch.sin(3 * latents) + 0.5 * noise


def start(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def reference(config, num_steps, seed=0, sigmas=None):
    scheduler = UniPCMultistepScheduler(**config)
    scheduler.set_timesteps(num_steps, sigmas=sigmas)
    scheduler.set_begin_index(0)
    latents, trajectory = start(seed), []
    for step, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, step), timestep, latents, return_dict=False)[0]
        trajectory.append(latents)
    return scheduler, trajectory


def run(sampler, sigmas, seed=0):
    table = sampler.coefficients(sigmas)
    latents, trajectory = start(seed), []
    history = sampler.initial_history(latents)
    for step, row in enumerate(table):
        coefficients = row.view(1, -1, 1, 1, 1)
        latents, history = sampler.step(latents, velocity(latents, step), coefficients, history)
        trajectory.append(latents)
    return trajectory


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 20, 50])
def test_every_step_is_that_of_diffusers(order, shift, num_steps):
    config = CONFIG | {"solver_order": order, "flow_shift": shift}
    scheduler, expected = reference(config, num_steps)
    sigmas, timesteps = schedule(config, num_inference_steps=num_steps)
    assert torch.equal(sigmas, scheduler.sigmas)
    assert torch.equal(timesteps, scheduler.timesteps.float())
    for ours, theirs in zip(run(UniPC(order), sigmas), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5)


def test_given_sigmas_go_through_the_shift_as_in_diffusers():
    given = [1.0, 0.7, 0.2]
    scheduler, expected = reference(CONFIG, None, sigmas=torch.tensor(given, dtype=torch.float64).numpy())
    sigmas, timesteps = schedule(sigmas=given)
    assert torch.equal(sigmas, scheduler.sigmas)
    assert torch.equal(timesteps, scheduler.timesteps.float())
    torch.testing.assert_close(run(UniPC(), sigmas)[-1], expected[-1], rtol=5e-5, atol=5e-5)


def test_given_timesteps_are_used_as_they_are():
    sigmas, timesteps = schedule(timesteps=[900.5, 500.0])
    torch.testing.assert_close(sigmas, torch.tensor([0.9005, 0.5, 0.0]))
    assert timesteps.tolist() == [900.5, 500.0]


def test_rows_at_different_steps_give_what_they_give_alone():
    sampler = UniPC()
    runs = [schedule(num_inference_steps=count)[0] for count in (4, 9)]
    alone = [run(sampler, sigmas, seed) for seed, sigmas in enumerate(runs)]
    tables = [sampler.coefficients(sigmas) for sigmas in runs]
    # The second request has taken three steps when the first one begins.
    states = [(start(0), sampler.initial_history(start(0)), 0), (start(1), sampler.initial_history(start(1)), 0)]
    for _ in range(3):
        states[1] = advance(sampler, [states[1]], [tables[1]])[0]
    for step in range(4):
        states = advance(sampler, states, tables)
        torch.testing.assert_close(states[0][0], alone[0][step])
        torch.testing.assert_close(states[1][0], alone[1][step + 3])


def advance(sampler, states, tables):
    coefficients = torch.stack([table[step] for (_, _, step), table in zip(states, tables, strict=True)])
    latents, history = sampler.step(
        torch.cat([latents for latents, _, _ in states]),
        torch.cat([velocity(latents, step) for latents, _, step in states]),
        coefficients.view(len(states), -1, 1, 1, 1),
        {name: torch.cat([past[name] for _, past, _ in states]) for name in states[0][1]},
    )
    return [
        (latents[row : row + 1], {name: values[row : row + 1] for name, values in history.items()}, step + 1)
        for row, (_, _, step) in enumerate(states)
    ]


def test_a_step_leaves_latents_and_history_as_they_were():
    sampler, latents = UniPC(), start(0)
    coefficients = sampler.coefficients(torch.tensor([0.9, 0.5, 0.0]))[0].view(1, -1, 1, 1, 1)
    history = sampler.initial_history(latents)
    sampler.step(latents, velocity(latents, 0), coefficients, history)
    assert torch.equal(latents, start(0))
    assert all(not values.any() for values in history.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "epsilon"),
        ("use_flow_sigmas", False),
        ("solver_type", "bh1"),
        ("solver_order", 4),
        ("lower_order_final", False),
        ("final_sigmas_type", "sigma_min"),
        ("use_karras_sigmas", True),
        ("use_dynamic_shifting", True),
        ("disable_corrector", [0]),
        ("thresholding", True),
    ],
)
def test_another_configuration_is_refused_by_name(name, value):
    check_unipc_config(CONFIG)
    with pytest.raises(InvalidModelFolderError, match=f"{name}=.*not supported"):
        check_unipc_config(CONFIG | {name: value})
