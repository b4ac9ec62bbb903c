"""The one denoising loop, one step at a time.

A request's whole state between two steps is a :class:`DenoiseState`. :func:`denoise_step` advances any set of them,
at different steps, scales and prompts, in as few forwards of the transformer as their shapes allow.

Shapes: N outputs of one request, B rows of one forward, T steps, L condition tokens, ``...`` the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Protocol

import torch

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.guidance import CombineRule, Guidance
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.sequences import concatenate, pad_sequences
from vllm_omni.diffusion.step_memory import ForwardRow, StepMemory, forward_rows

# Inputs of one branch. Tensors have one row, shared by all outputs of the request, or one row per output.
# Anything else (a shape, a flag) must be hashable, and requests share a forward only if it is equal.
Conditions = Mapping[str, Any]

# From this many latent values per output on, a forward is bound by arithmetic: padding would waste it, and a mask
# would rule out the fastest attention kernels. 1024 x 1024 pixels are 262,144 values in Qwen-Image.
_NO_PADDING_FROM = 131_072


# What a sampler remembers of a request: tensors of the shape of its latents, by name.
History = Mapping[str, torch.Tensor]


class Sampler(Protocol):
    """Turns a prediction into the latents of the next step.

    It is a value without state: what it knows of a request's noise levels is a table of coefficients, what it
    remembers is a history, and requests of equal samplers take a step together, each at a step of its own.
    """

    def coefficients(self, sigmas: torch.Tensor) -> torch.Tensor:
        """``sigmas [T + 1] -> [T, K]``: the numbers of each step, made once per request."""
        ...

    def initial_history(self, latents: torch.Tensor) -> History:
        """The history before the first step, from ``latents [N, ...]``. Every step returns the same names."""
        ...

    def step(
        self, latents: torch.Tensor, prediction: torch.Tensor, coefficients: torch.Tensor, history: History
    ) -> tuple[torch.Tensor, History]:
        """``latents [B, ...], prediction [B, ...], coefficients [B, K, 1, ...] -> latents [B, ...]``, new history.

        ``coefficients[:, k]`` broadcasts against the latents. ``history`` must be left as it is, so that a step that
        failed can be tried again.
        """
        ...


@dataclass(slots=True, kw_only=True)
class DenoiseState:
    """Everything that a request needs between two steps. Nothing about a request lives anywhere else."""

    request_id: str
    latents: torch.Tensor  # [N, ...], float32
    sigmas: torch.Tensor  # [T + 1], float32, in [0, 1], the last one 0
    timesteps: torch.Tensor  # [T], float32, in [0, 1000]
    branches: tuple[Conditions, ...]  # the positive one first
    # Conditions that change with the step, one entry per step, added to those of each branch; empty if none do.
    step_conditions: tuple[Conditions, ...] = ()
    sampler: Sampler
    guidance: Guidance | None  # None if there is one branch
    height: int  # pixels
    width: int  # pixels
    step_index: int = 0
    coefficients: torch.Tensor = field(init=False)  # [T, K], the sampler's
    history: History = field(init=False)  # the sampler's, [N, ...] each
    cache: StepMemory = field(default_factory=StepMemory)  # a step cache's

    def __post_init__(self) -> None:
        assert len(self.step_conditions) in (0, self.num_steps), "step_conditions has one entry per step, or none"
        self.coefficients = self.sampler.coefficients(self.sigmas)
        self.history = self.sampler.initial_history(self.latents)

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.latents.shape[0]

    @property
    def is_done(self) -> bool:
        return self.step_index >= self.num_steps


class SteppedPipeline(Protocol):
    """A pipeline of three verbs, which the engine can drive one step at a time.

    ``sequence_conditions`` maps a condition ``[1 or N, L, D]`` whose length may differ between requests to the name
    of its mask, ``[B, L]`` and True for real tokens, which :func:`denoise_step` adds; it is None without padding.
    """

    sequence_conditions: ClassVar[Mapping[str, str]]

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState: ...

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, ...], timestep [B] in [0, 1000] -> prediction [B, ...]``: one branch, one forward."""
        ...

    def decode(self, state: DenoiseState) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows ``start`` to ``stop`` of one branch of one state: what a forward is made of."""

    state: DenoiseState
    branch: int
    start: int
    stop: int

    @property
    def conditions(self) -> Conditions:
        branch = self.state.branches[self.branch]
        if not self.state.step_conditions:
            return branch
        return {**branch, **self.state.step_conditions[self.state.step_index]}

    def forward_rows(self) -> list[ForwardRow]:
        state, outputs = self.state, range(self.start, self.stop)
        return [ForwardRow(state.cache, self.branch, output, state.step_index, state.num_steps) for output in outputs]


def denoise_step(states: Sequence[DenoiseState], pipeline: SteppedPipeline, max_batch_size: int = 16) -> None:
    """Advance every state by one step, in forwards of at most ``max_batch_size`` rows.

    The states change only after all predictions succeeded, so a step that failed can be tried again.
    """
    predictions = _predict(states, pipeline, max_batch_size)
    advanced = [(group, *_step(group, predictions)) for group in _alike(states, _step_key)]
    for group, latents, history in advanced:
        counts = [state.num_outputs for state in group]
        remembered = {name: values.split(counts) for name, values in history.items()}
        for index, (state, rows) in enumerate(zip(group, latents.split(counts), strict=True)):
            state.latents = rows
            state.history = {name: values[index] for name, values in remembered.items()}
            state.step_index += 1
            state.cache.commit_step()


def denoise(pipeline: SteppedPipeline, request: OmniDiffusionRequest) -> DiffusionOutput:
    """Run one request from its prompt to its pixels: the ``forward`` of a pipeline of three verbs."""
    with torch.inference_mode():
        state = pipeline.prepare(request)
        while not state.is_done:
            denoise_step([state], pipeline)
        return DiffusionOutput(output=pipeline.decode(state))


def _predict(
    states: Sequence[DenoiseState], pipeline: SteppedPipeline, max_batch_size: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Prediction ``[N, ...]`` of each branch of each state, by ``(id(state), branch)``."""
    pieces: dict[tuple[int, int], list[torch.Tensor]] = {}
    for state in states:
        state.cache.begin_step()
    rows = [
        _Rows(state, branch, start, min(start + max_batch_size, state.num_outputs))
        for state in states
        for branch in range(len(state.branches))
        for start in range(0, state.num_outputs, max_batch_size)
    ]
    for group in _alike(rows, lambda item: _forward_key(item, pipeline.sequence_conditions)):
        for batch in _batches(group, max_batch_size):
            with forward_rows([row for item in batch for row in item.forward_rows()]):
                prediction = pipeline.predict(
                    concatenate([item.state.latents[item.start : item.stop] for item in batch]),
                    _per_row(batch, [item.state.timesteps for item in batch]),
                    _collate(batch, pipeline.sequence_conditions),
                )
            counts = [item.stop - item.start for item in batch]
            for item, piece in zip(batch, prediction.split(counts), strict=True):
                pieces.setdefault((id(item.state), item.branch), []).append(piece)
    return {key: concatenate(parts) for key, parts in pieces.items()}


def _step(
    states: Sequence[DenoiseState], predictions: Mapping[tuple[int, int], torch.Tensor]
) -> tuple[torch.Tensor, History]:
    """Combine the branches and take the sampler's step, for all outputs of ``states`` at once: ``[sum N, ...]``."""
    first = states[0]
    rows = [_Rows(state, 0, 0, state.num_outputs) for state in states]
    latents = concatenate([state.latents for state in states])
    column = (-1,) + (1,) * (latents.dim() - 1)
    branches = [
        concatenate([predictions[id(state), branch] for state in states]).float()
        for branch in range(len(first.branches))
    ]
    if first.guidance is None:
        prediction = branches[0]
    else:
        scales = [state.guidance.scale for state in states if state.guidance is not None]
        prediction = first.guidance.combine(branches, _per_row(rows, scales).view(column))
    coefficients = _per_row(rows, [state.coefficients for state in states])
    history = {name: concatenate([state.history[name] for state in states]) for name in first.history}
    return first.sampler.step(latents, prediction, coefficients.view(*coefficients.shape, *column[1:]), history)


def _step_key(state: DenoiseState) -> tuple[Any, ...]:
    combine: CombineRule | None = None if state.guidance is None else state.guidance.combine
    return (state.latents.shape[1:], len(state.branches), combine, state.sampler)


def _forward_key(item: _Rows, sequence_conditions: Mapping[str, str]) -> tuple[Any, ...]:
    """Rows with equal keys can share a forward."""
    sample = item.state.latents[0]
    may_pad = sample.numel() < _NO_PADDING_FROM
    signature: list[Any] = [sample.shape]
    for name, value in sorted(item.conditions.items()):
        if not isinstance(value, torch.Tensor):
            signature.append((name, value))
        elif may_pad and name in sequence_conditions:
            signature.append((name, value.shape[2:]))
        else:
            signature.append((name, value.shape[1:]))
    return tuple(signature)


def _alike(items: Sequence[Any], key: Any) -> Iterator[list[Any]]:
    """Groups of items with equal keys, in the order in which each key first appears."""
    order: dict[Any, int] = {}
    ranks = [order.setdefault(key(item), len(order)) for item in items]
    for _, group in groupby(sorted(zip(ranks, range(len(items)), strict=True)), key=lambda pair: pair[0]):
        yield [items[index] for _, index in group]


def _batches(rows: Sequence[_Rows], max_batch_size: int) -> Iterator[list[_Rows]]:
    """Consecutive rows, at most ``max_batch_size`` in each batch."""
    batch: list[_Rows] = []
    size = 0
    for item in rows:
        count = item.stop - item.start
        if batch and size + count > max_batch_size:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += count
    if batch:
        yield batch


def _collate(batch: Sequence[_Rows], sequence_conditions: Mapping[str, str]) -> dict[str, Any]:
    """The conditions of a batch, one row each; sequences of different length are padded with zeros."""
    collated: dict[str, Any] = {}
    for name, value in batch[0].conditions.items():
        if not isinstance(value, torch.Tensor):
            collated[name] = value
            continue
        parts = [_expand(item.conditions[name], item) for item in batch]
        mask_name = sequence_conditions.get(name)
        if mask_name is not None:
            parts, collated[mask_name] = pad_sequences(parts)
        collated[name] = concatenate(parts)
    return collated


def _expand(value: torch.Tensor, item: _Rows) -> torch.Tensor:
    if value.shape[0] == 1:
        return value.expand(item.stop - item.start, *value.shape[1:])
    return value[item.start : item.stop]


def _per_row(batch: Sequence[_Rows], tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """The entry of each state's table ``[T, ...]`` at its current step, one per row: ``[B, ...]``."""
    entries = []
    for item, table in zip(batch, tables, strict=True):
        index = item.state.step_index
        entries.append(table[index : index + 1].expand(item.stop - item.start, *table.shape[1:]))
    return concatenate(entries)
