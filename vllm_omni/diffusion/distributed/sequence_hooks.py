"""Carrying out the ``_sp_plan`` of a transformer by hooks on its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_omni.diffusion.distributed.groups import ParallelGroups
from vllm_omni.diffusion.distributed.sequence_parallel import (
    SequenceParallelInput,
    SequenceParallelOutput,
    ShardedForward,
    SplitEntry,
    forward_in_progress,
    plan_error,
    sharded_forward,
)
from vllm_omni.diffusion.distributed.sequence_plan import (
    entries_of,
    modules_of,
    parameter_names,
    plan_of,
    planned_transformers,
)

_Inputs = dict[str, SplitEntry]
_Outputs = dict[int, "SplitEntry | SequenceParallelOutput"]


def apply_sequence_plans(pipeline: nn.Module, groups: ParallelGroups) -> set[str]:
    """Let the ranks of ``groups.sequence`` split the sequence of every forward of the planned transformers.

    It comes last: it goes around the forward that a cache or a compiler has put in place. Returns the names of the
    attention backends that have run, a set that grows as forwards run.
    """
    used_backends: set[str] = set()
    for transformer in planned_transformers(pipeline):
        root_inputs: _Inputs = {}
        for path, entries in plan_of(transformer).items():
            inputs, outputs = _by_place(entries)
            for module in modules_of(transformer, path):
                if module is transformer:
                    root_inputs = inputs
                    continue
                if inputs:
                    module.register_forward_pre_hook(_split_inputs(inputs), with_kwargs=True)
                if outputs:
                    module.register_forward_hook(_change_outputs(outputs), with_kwargs=True)
        transformer.forward = _begun(transformer, groups, root_inputs, used_backends)
    return used_backends


def _by_place(entries: Any) -> tuple[_Inputs, _Outputs]:
    inputs: _Inputs = {}
    outputs: _Outputs = {}
    for key, entry in entries_of(entries):
        if isinstance(entry, SequenceParallelOutput) or entry.split_output:
            outputs[int(key)] = entry
        else:
            inputs[str(key)] = entry
    return inputs, outputs


def _begun(
    transformer: nn.Module, groups: ParallelGroups, inputs: _Inputs, used_backends: set[str]
) -> Callable[..., Any]:
    """The transformer's forward, its own inputs split, within a :class:`ShardedForward`."""
    forward, outputs = transformer.forward, _by_place(plan_of(transformer).get("", {}))[1]

    def sequence_parallel_forward(*args: Any, **kwargs: Any) -> Any:
        values = _named(transformer, args, kwargs)
        sharded = ShardedForward(groups, values, used_backends)
        with sharded_forward(sharded):
            output = forward(**{**values, **_split_named(sharded, inputs, values, type(transformer).__name__)})
            return _changed(sharded, outputs, output, values, type(transformer).__name__)

    return sequence_parallel_forward


def _split_inputs(inputs: _Inputs) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sharded = forward_in_progress()
        if sharded is None:
            return None
        values = _named(module, args, kwargs)
        return (), {**values, **_split_named(sharded, inputs, values, type(module).__name__)}

    return hook


def _change_outputs(outputs: _Outputs) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        sharded = forward_in_progress()
        if sharded is None:
            return None
        return _changed(sharded, outputs, output, _named(module, args, kwargs), type(module).__name__)

    return hook


def _named(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}


def _split_named(sharded: ShardedForward, inputs: _Inputs, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        key: _split(sharded, entry, values[key], values, f"{key} of {name}")
        for key, entry in inputs.items()
        if values.get(key) is not None
    }


def _changed(sharded: ShardedForward, outputs: _Outputs, output: Any, values: Mapping[str, Any], name: str) -> Any:
    """The outputs of a module with those of its plan split or gathered."""
    if not outputs:
        return output
    is_single = isinstance(output, torch.Tensor)
    parts = [output] if is_single else list(output)
    for index, entry in outputs.items():
        what = f"output {index} of {name}"
        if index >= len(parts):
            raise plan_error(f"there is no {what}, which returns {len(parts)}")
        if isinstance(entry, SequenceParallelOutput):
            _check_dims(parts[index], entry.gather_dim, entry.expected_dims, what)
            parts[index] = sharded.gather(parts[index], entry.gather_dim)
        else:
            parts[index] = _split(sharded, entry, parts[index], values, what)
    return parts[0] if is_single else type(output)(parts)


def _split(sharded: ShardedForward, entry: SplitEntry, value: Any, values: Mapping[str, Any], name: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_split(sharded, entry, part, values, name) for part in value)
    _check_dims(value, entry.split_dim, entry.expected_dims, name)
    if isinstance(entry, SequenceParallelInput):
        return sharded.split(value, entry.split_dim, name)
    return sharded.split_after_text(value, entry.split_dim, _num_text(sharded, entry.text_len_source, values), name)


def _check_dims(value: Any, dim: int, expected: int | None, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise plan_error(f"{name} is no tensor but {type(value).__name__}")
    if expected is not None and value.dim() != expected:
        raise plan_error(f"{name} has shape {list(value.shape)}, expected_dims is {expected}")
    if not -value.dim() <= dim < value.dim():
        raise plan_error(f"{name} has shape {list(value.shape)} and no dimension {dim}")


def _num_text(sharded: ShardedForward, source: str | int, values: Mapping[str, Any]) -> int:
    if isinstance(source, int):
        return source
    value = values[source] if source in values else sharded.arguments[source]
    if isinstance(value, torch.Tensor):
        return value.shape[1 if value.dim() > 2 else 0]
    return int(value)
