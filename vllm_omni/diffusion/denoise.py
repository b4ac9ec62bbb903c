"""The one denoising loop, one step at a time.

A request's whole state between two steps is a :class:`DenoiseState`. :func:`denoise_step` advances any set of them,
at different steps, scales and prompts, in as few forwards of the transformer as their shapes allow.

Shapes: N outputs of one request, B rows of one update, ``...`` the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.denoise_state import (
    Conditions,
    DenoiseState,
    History,
    Sampler,
    SteppedPipeline,
    is_stepped,
)
from vllm_omni.diffusion.distributed.cfg_parallel import exchange, owned_outputs, owner_of
from vllm_omni.diffusion.distributed.groups import RankGroup, current_groups
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.sequences import concatenate
from vllm_omni.diffusion.step_memory import forward_rows
from vllm_omni.diffusion.step_plan import PlannedUpdate, StepPlan, plan_steps

__all__ = [
    "Conditions",
    "DenoiseState",
    "History",
    "Sampler",
    "SteppedPipeline",
    "denoise",
    "denoise_step",
    "is_stepped",
]

# Prediction [N, ...] of each branch of each state, by (id(state), branch).
_Predictions = Mapping[tuple[int, int], torch.Tensor]


def denoise_step(
    states: Sequence[DenoiseState],
    pipeline: SteppedPipeline,
    max_batch_size: int = 16,
    plan: StepPlan | None = None,
) -> StepPlan:
    """Advance every state by one step, in forwards of at most ``max_batch_size`` rows.

    Returns the plan by which it did so. Given to the next call, it saves the work of planning if it is for the same
    states; if one came or left, it is made anew. The states change only after all predictions succeeded, so a step
    that failed can be tried again.
    """
    if plan is None or not plan.serves(states, max_batch_size):
        padded = getattr(pipeline, "sequence_conditions", {})
        plan = plan_steps(states, padded, max_batch_size, current_groups().cfg)
    step = plan.num_steps_done
    predictions = _predict(states, plan, step, pipeline)
    advanced = [(update, *_update(update, step, predictions)) for update in plan.updates]
    for update, latents, history in advanced:
        remembered = {name: values.split_with_sizes(update.counts) for name, values in history.items()}
        for index, (state, rows) in enumerate(zip(update.states, latents.split_with_sizes(update.counts), strict=True)):
            state.latents = rows
            state.history = {name: values[index] for name, values in remembered.items()}
            state.step_index += 1
            state.cache.commit_step(is_last=state.is_done)
    return plan


def denoise(pipeline: SteppedPipeline, request: OmniDiffusionRequest) -> DiffusionOutput:
    """Run one request from its prompt to its pixels: the ``forward`` of a pipeline of three verbs."""
    with torch.inference_mode():
        state = pipeline.prepare(request)
        plan = None
        while not state.is_done:
            plan = denoise_step([state], pipeline, plan=plan)
        del plan  # decoding needs the memory
        return DiffusionOutput(output=pipeline.decode(state))


def _predict(states: Sequence[DenoiseState], plan: StepPlan, step: int, pipeline: SteppedPipeline) -> _Predictions:
    pieces: dict[tuple[int, int], list[torch.Tensor]] = {}
    for state in states:
        state.cache.begin_step()
    for forward in plan.forwards:
        with forward_rows([row for item in forward.rows for row in item.forward_rows()]):
            latents = concatenate([item.latents for item in forward.rows])
            prediction = pipeline.predict(latents, forward.timesteps[step], dict(forward.conditions))
        shape = getattr(prediction, "shape", None)
        if shape != latents.shape:
            returned = type(prediction).__name__ if shape is None else f"a prediction of {tuple(shape)}"
            name = type(pipeline).__name__
            raise TypeError(f"{name}.predict returned {returned} for latents of {tuple(latents.shape)}")
        for item, piece in zip(forward.rows, prediction.split_with_sizes(forward.counts), strict=True):
            pieces.setdefault((id(item.state), item.branch), []).append(piece)
    group = current_groups().cfg
    if group.size > 1:
        return _predictions_of_all_ranks(states, {key: torch.cat(parts) for key, parts in pieces.items()}, group)
    return {key: concatenate(parts) for key, parts in pieces.items()}


def _predictions_of_all_ranks(
    states: Sequence[DenoiseState], owned: _Predictions, group: RankGroup
) -> dict[tuple[int, int], torch.Tensor]:
    """Every row's prediction, from those of this rank's rows."""
    rows: dict[tuple[int, int, int], torch.Tensor] = {}
    owners: dict[tuple[int, int, int], int] = {}
    shapes: dict[tuple[int, int, int], torch.Size] = {}
    for state in states:
        num_rows = len(state.branches) * state.num_outputs
        for row in range(num_rows):
            branch, output = divmod(row, state.num_outputs)
            key = (id(state), branch, output)
            owners[key] = owner_of(state.request_id, row, num_rows, group.size)
            shapes[key] = state.latents.shape[1:]
        for branch in range(len(state.branches)):
            outputs = owned_outputs(state.request_id, branch, state.num_outputs, len(state.branches), group)
            for index, output in enumerate(outputs):
                rows[id(state), branch, output] = owned[id(state), branch][index]
    whole = exchange(rows, owners, shapes, group, states[0].latents.device)
    return {
        (id(state), branch): torch.stack([whole[id(state), branch, output] for output in range(state.num_outputs)])
        for state in states
        for branch in range(len(state.branches))
    }


def _update(update: PlannedUpdate, step: int, predictions: _Predictions) -> tuple[torch.Tensor, History]:
    """Combine the branches and take the sampler's step, for all outputs of the states at once: ``[B, ...]``."""
    states, first = update.states, update.states[0]
    branches = [
        concatenate([predictions[id(state), branch] for state in states]).float()
        for branch in range(len(first.branches))
    ]
    prediction = branches[0]
    if first.guidance is not None:
        assert update.scales is not None, "states of one update have guidance alike"
        prediction = first.guidance.combine(branches, update.scales[step])
    latents = concatenate([state.latents for state in states])
    history = {name: concatenate([state.history[name] for state in states]) for name in first.history}
    return first.sampler.step(latents, prediction, update.coefficients[step], history)
