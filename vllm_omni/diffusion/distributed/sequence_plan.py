"""Reading and checking the ``_sp_plan`` of a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from vllm_omni.diffusion.distributed.sequence_parallel import (
    PLAN_OPTION,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    SequenceParallelPlan,
    SplitEntry,
)
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError


def planned_transformers(pipeline: nn.Module) -> list[nn.Module]:
    """The modules of a pipeline that declare a ``_sp_plan``."""
    return [module for module in pipeline.modules() if plan_of(module)]


def check_sequence_plans(pipeline: nn.Module) -> None:
    """Refuse a pipeline that cannot split its sequence, or whose plan names what is not there.

    Raises ``FeatureNotAvailableError`` or ``InvalidConfigError``.
    """
    transformers = planned_transformers(pipeline)
    if not transformers:
        raise FeatureNotAvailableError(
            f"ulysses_degree and ring_degree: no transformer of {type(pipeline).__name__} declares a _sp_plan, so"
            " nothing says where its sequence can be split; leave the options out"
        )
    for transformer in transformers:
        _check_plan(transformer, plan_of(transformer))


def plan_of(transformer: nn.Module) -> SequenceParallelPlan:
    """The plan that a module declares; empty if it declares none."""
    plan: SequenceParallelPlan = getattr(type(transformer), "_sp_plan", {})
    return plan


def modules_of(transformer: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that a key names; ``*`` stands for every child."""
    found = [transformer]
    for part in path.split(".") if path else ():
        if part == "*":
            found = [child for module in found for child in module.children()]
        else:
            found = [module.get_submodule(part) for module in found]
    return iter(found)


def _check_plan(transformer: nn.Module, plan: SequenceParallelPlan) -> None:
    name = type(transformer).__name__
    kinds = {isinstance(entry, SequenceParallelOutput) for part in plan.values() for _, entry in entries_of(part)}
    if kinds != {True, False}:
        lacking = "SequenceParallelInput" if False not in kinds else "SequenceParallelOutput"
        raise InvalidConfigError(
            f"{name}._sp_plan has no {lacking}: it must say where the sequence is split, and where it is whole again",
            option=PLAN_OPTION,
        )
    for path, entries in plan.items():
        try:
            modules = list(modules_of(transformer, path))
        except AttributeError as error:
            raise InvalidConfigError(
                f"{name}._sp_plan names {path!r}, which it has no module of ({error})", option=PLAN_OPTION
            ) from None
        if not modules:
            raise InvalidConfigError(f"{name}._sp_plan names {path!r}, which matches no module", option=PLAN_OPTION)
        for key, entry in entries_of(entries):
            _check_entry(name, path, key, entry)
            for module in modules:
                _check_key(name, path, key, entry, transformer, module)


def entries_of(entries: Any) -> list[tuple[str | int, SplitEntry | SequenceParallelOutput]]:
    if isinstance(entries, SequenceParallelOutput):
        return [(0, entries)]
    if isinstance(entries, Mapping):
        return list(entries.items())
    return list(enumerate(entries))


def _check_entry(name: str, path: str, key: str | int, entry: Any) -> None:
    kinds = (SequenceParallelInput, SequenceParallelPartialInput, SequenceParallelOutput)
    if not isinstance(entry, kinds):
        raise InvalidConfigError(
            f"{name}._sp_plan[{path!r}][{key!r}] must be one of {', '.join(kind.__name__ for kind in kinds)}, not"
            f" {type(entry).__name__}",
            option=PLAN_OPTION,
        )
    dim = entry.gather_dim if isinstance(entry, SequenceParallelOutput) else entry.split_dim
    text = getattr(entry, "text_len_source", 0)
    for field, value in (("dimension", dim), ("text_len_source", 0 if isinstance(text, str) else text)):
        if isinstance(value, bool) or not isinstance(value, int) or (field != "dimension" and value < 0):
            raise InvalidConfigError(
                f"{name}._sp_plan[{path!r}][{key!r}]: {field} {value!r} must be"
                f" {'an integer' if field == 'dimension' else 'a number of at least 0, or the name of a parameter'}",
                option=PLAN_OPTION,
            )
    if entry.expected_dims is not None and not -entry.expected_dims <= dim < entry.expected_dims:
        raise InvalidConfigError(
            f"{name}._sp_plan[{path!r}][{key!r}]: dimension {dim} does not exist in a tensor of"
            f" expected_dims={entry.expected_dims}",
            option=PLAN_OPTION,
        )


def _check_key(name: str, path: str, key: str | int, entry: Any, transformer: nn.Module, module: nn.Module) -> None:
    parameters = parameter_names(module)
    kinds = {parameter.kind for parameter in inspect.signature(type(module).forward).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        raise InvalidConfigError(
            f"{name}._sp_plan[{path!r}]: {type(module).__name__}.forward takes *args, which have no names; write its"
            " parameters out",
            option=PLAN_OPTION,
        )
    if isinstance(entry, SequenceParallelOutput) or entry.split_output:
        if isinstance(key, bool) or not isinstance(key, int):
            raise InvalidConfigError(
                f"{name}._sp_plan[{path!r}]: {key!r} is changed where it comes out, so it must be the index of an"
                " output",
                option=PLAN_OPTION,
            )
    elif key not in parameters and not (isinstance(key, str) and inspect.Parameter.VAR_KEYWORD in kinds):
        raise InvalidConfigError(
            f"{name}._sp_plan[{path!r}] names {key!r}, which is no parameter of {type(module).__name__}.forward; it"
            f" has {', '.join(parameters)}",
            option=PLAN_OPTION,
        )
    source = getattr(entry, "text_len_source", 0)  # outputs have none
    if isinstance(source, str) and source not in (*parameters, *parameter_names(transformer)):
        raise InvalidConfigError(
            f"{name}._sp_plan[{path!r}][{key!r}]: text_len_source={source!r} is a parameter of neither"
            f" {type(module).__name__}.forward nor {name}.forward",
            option=PLAN_OPTION,
        )


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module's forward, as its class has it: what a compiler puts before it takes anything."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
