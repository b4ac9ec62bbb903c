"""Which rows share a forward and which states an update, for states that take their steps together.

A plan holds nothing but what it read from its states, so it may be dropped between any two steps. Kept while the same
states advance together, it saves each step the work of putting their conditions and schedules together.

Shapes: N outputs of one request, B rows of one forward or update, K steps until the first of the states is done,
C coefficients of a sampler, L condition tokens, ``...`` the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vllm_omni.diffusion.denoise_state import Conditions, DenoiseState
from vllm_omni.diffusion.distributed.cfg_parallel import owned_outputs
from vllm_omni.diffusion.distributed.groups import ALONE, RankGroup
from vllm_omni.diffusion.sequences import concatenate, pad_sequences
from vllm_omni.diffusion.step_memory import ForwardRow

# From this many latent values per output on, a forward is bound by arithmetic: padding would waste it, and a mask
# would rule out the fastest attention kernels. 1024 x 1024 pixels are 262,144 values in Qwen-Image.
_NO_PADDING_FROM = 131_072

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Outputs ``start`` to ``stop`` of one branch of one state: what a forward is made of."""

    state: DenoiseState
    branch: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def latents(self) -> torch.Tensor:
        return self.state.latents[self.start : self.stop]

    @property
    def conditions(self) -> Conditions:
        branch, step = self.state.branches[self.branch], _conditions_of_step(self.state)
        return branch if step is None else {**branch, **step}

    def forward_rows(self) -> list[ForwardRow]:
        state, outputs = self.state, range(self.start, self.stop)
        timesteps = None if state.step_conditions else state.timesteps
        return [
            ForwardRow(state.cache, self.branch, output, state.step_index, state.num_steps, timesteps)
            for output in outputs
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedForward:
    """One forward of each step."""

    rows: tuple[Rows, ...]
    counts: list[int]  # of each of the rows
    timesteps: torch.Tensor  # [K, B]
    conditions: Conditions  # one row each


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedUpdate:
    """States that combine their branches and take the sampler's step at once."""

    states: tuple[DenoiseState, ...]
    counts: list[int]  # outputs of each
    scales: torch.Tensor | None  # [K, B, 1, ...] of the guidance, None without
    coefficients: torch.Tensor  # [K, B, C, 1, ...]


@dataclass(frozen=True, slots=True)
class _Basis:
    """What a plan rests on of one state."""

    state: DenoiseState
    step_index: int
    branches: tuple[Conditions, ...]
    step_conditions: Conditions | None

    def holds_after(self, num_steps: int) -> bool:
        state = self.state
        return (
            state.step_index == self.step_index + num_steps
            and not state.is_done
            and state.branches is self.branches
            and _conditions_of_step(state) is self.step_conditions
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The forwards and updates of the next steps of some states."""

    max_batch_size: int
    forwards: tuple[PlannedForward, ...]
    updates: tuple[PlannedUpdate, ...]
    _bases: tuple[_Basis, ...]

    @property
    def num_steps_done(self) -> int:
        """Steps since the plan was made."""
        return self._bases[0].state.step_index - self._bases[0].step_index

    def serves(self, states: Sequence[DenoiseState], max_batch_size: int) -> bool:
        """Whether these are the states of the plan, all as many steps on, and nothing else about them has changed."""
        return (
            max_batch_size == self.max_batch_size
            and len(states) == len(self._bases)
            and all(basis.state is state for basis, state in zip(self._bases, states, strict=True))
            and all(basis.holds_after(self.num_steps_done) for basis in self._bases)
        )


def plan_steps(
    states: Sequence[DenoiseState],
    sequence_conditions: Mapping[str, str],
    max_batch_size: int,
    group: RankGroup = ALONE,
) -> StepPlan:
    """Plan for ``states``, none of which is done, in forwards of at most ``max_batch_size`` rows.

    The ranks of ``group`` share the forwards; the updates are made by each of them.
    """
    num_steps = min(state.num_steps - state.step_index for state in states)
    rows = [
        Rows(state, branch, start, min(start + max_batch_size, outputs.stop))
        for state in states
        for branch in range(len(state.branches))
        for outputs in [owned_outputs(state.request_id, branch, state.num_outputs, len(state.branches), group)]
        for start in range(outputs.start, outputs.stop, max_batch_size)
    ]
    forwards = [
        PlannedForward(
            rows=tuple(batch),
            counts=[item.count for item in batch],
            timesteps=_steps_ahead(num_steps, ((item.state, item.state.timesteps, item.count) for item in batch)),
            conditions=_collate(batch, sequence_conditions),
        )
        for group in _alike(rows, lambda item: _forward_key(item, sequence_conditions))
        for batch in _batches(group, max_batch_size)
    ]
    return StepPlan(
        max_batch_size=max_batch_size,
        forwards=tuple(forwards),
        updates=tuple(_planned_update(group, num_steps) for group in _alike(states, _update_key)),
        _bases=tuple(_Basis(state, state.step_index, state.branches, _conditions_of_step(state)) for state in states),
    )


def _conditions_of_step(state: DenoiseState) -> Conditions | None:
    return state.step_conditions[state.step_index] if state.step_conditions else None


def _planned_update(states: Sequence[DenoiseState], num_steps: int) -> PlannedUpdate:
    column = (1,) * (states[0].latents.dim() - 1)
    scales = None
    if states[0].guidance is not None:
        tables = ((state, state.guidance.scale, state.num_outputs) for state in states if state.guidance is not None)
        scales = _steps_ahead(num_steps, tables)
        scales = scales.view(*scales.shape, *column)
    coefficients = _steps_ahead(num_steps, ((state, state.coefficients, state.num_outputs) for state in states))
    return PlannedUpdate(
        states=tuple(states),
        counts=[state.num_outputs for state in states],
        scales=scales,
        coefficients=coefficients.view(*coefficients.shape, *column),
    )


def _steps_ahead(num_steps: int, tables: Iterable[tuple[DenoiseState, torch.Tensor, int]]) -> torch.Tensor:
    """``[K, B, ...]``: the next ``num_steps`` entries of each state's table ``[T, ...]``, for its number of rows."""
    parts = []
    for state, table, count in tables:
        entries = table[state.step_index : state.step_index + num_steps].unsqueeze(1)
        parts.append(entries.expand(num_steps, count, *table.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _update_key(state: DenoiseState) -> tuple[Any, ...]:
    combine = None if state.guidance is None else state.guidance.combine
    return (state.latents.shape[1:], len(state.branches), combine, state.sampler)


def _forward_key(item: Rows, sequence_conditions: Mapping[str, str]) -> tuple[Any, ...]:
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


def _alike(items: Sequence[_T], key: Callable[[_T], Any]) -> Iterator[list[_T]]:
    """Groups of items with equal keys, in the order in which each key first appears."""
    groups: dict[Any, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return iter(groups.values())


def _batches(rows: Sequence[Rows], max_batch_size: int) -> Iterator[list[Rows]]:
    """Consecutive rows, at most ``max_batch_size`` in each batch."""
    batch: list[Rows] = []
    size = 0
    for item in rows:
        if batch and size + item.count > max_batch_size:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.count
    if batch:
        yield batch


def _collate(batch: Sequence[Rows], sequence_conditions: Mapping[str, str]) -> Conditions:
    """The conditions of a batch, one row each; sequences of different length are padded with zeros."""
    collated: dict[str, Any] = {}
    conditions = [item.conditions for item in batch]
    for name, value in conditions[0].items():
        if not isinstance(value, torch.Tensor):
            collated[name] = value
            continue
        parts = [_expand(given[name], item) for given, item in zip(conditions, batch, strict=True)]
        mask_name = sequence_conditions.get(name)
        if mask_name is not None:
            parts, collated[mask_name] = pad_sequences(parts)
        collated[name] = concatenate(parts)
    return collated


def _expand(value: torch.Tensor, item: Rows) -> torch.Tensor:
    if value.shape[0] == 1:
        return value.expand(item.count, *value.shape[1:])
    return value[item.start : item.stop]
