"""Timing two engines on the same work: in turns within one process, or each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vllm_omni.benchmarks.timing import alternate
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli.compare_engines import Call, ComparedEngine, DiffusersEngine, VllmOmniEngine, Workload
from vllm_omni.errors import ComparisonError, InvalidRequestError, OmniError
from vllm_omni.platforms import get_platform


@dataclass(kw_only=True)
class EngineResult:
    """What was measured of one engine. ``outputs[p]`` holds the pictures (or frames, or layers) of prompt p."""

    load_s: float
    seconds: list[list[float]] = field(default_factory=list)  # by prompt, then by trial
    outputs: list[list[list[Image.Image]]] = field(default_factory=list)  # by prompt, output, then frame
    peak_memory_bytes: int | None = None  # None where two engines share a process
    facts: dict[str, str] = field(default_factory=dict)


def measure_together(config: OmniDiffusionConfig, workload: Workload, calls: Sequence[Call]) -> dict[str, EngineResult]:
    """Both engines in this process, in turns."""
    ours = VllmOmniEngine(workload)
    return _measure(config, workload, {"vllm-omni": ours, "diffusers": DiffusersEngine(config, workload, calls)})


def measure_apart(config: OmniDiffusionConfig, workload: Workload, calls: Sequence[Call]) -> dict[str, EngineResult]:
    """Each engine in a process of its own, one after the other, so that each has the device's memory for itself."""
    return {
        "vllm-omni": _in_own_process(_measure_ours, config, workload),
        "diffusers": _in_own_process(_measure_theirs, config, workload, calls),
    }


def _measure_ours(config: OmniDiffusionConfig, workload: Workload) -> EngineResult:
    return _measure_alone(config, workload, VllmOmniEngine(workload))


def _measure_theirs(config: OmniDiffusionConfig, workload: Workload, calls: Sequence[Call]) -> EngineResult:
    return _measure_alone(config, workload, DiffusersEngine(config, workload, calls))


def _measure_alone(config: OmniDiffusionConfig, workload: Workload, engine: ComparedEngine) -> EngineResult:
    platform = get_platform(config.torch_device)
    platform.reset_peak_memory()
    result = _measure(config, workload, {"engine": engine})["engine"]
    result.peak_memory_bytes = max(platform.peak_memory(), engine.peak_memory_bytes)
    return result


def _measure(
    config: OmniDiffusionConfig, workload: Workload, engines: Mapping[str, ComparedEngine]
) -> dict[str, EngineResult]:
    results = {name: EngineResult(load_s=engine.load_s) for name, engine in engines.items()}
    for index in range(len(workload.prompts)):
        last: dict[str, list[list[Image.Image]]] = {}
        times = alternate(
            {name: _keeping(last, name, engine, index) for name, engine in engines.items()},
            workload.num_trials,
            num_warmup=workload.num_warmup,
            device=config.torch_device,
        )
        for name, result in results.items():
            result.seconds.append(times[name])
            result.outputs.append(last[name])
    for name, result in results.items():
        result.facts = engines[name].facts()
    return results


def _keeping(
    kept: dict[str, list[list[Image.Image]]], name: str, engine: ComparedEngine, index: int
) -> Callable[[], None]:
    def run() -> None:
        kept[name] = engine.generate(index)

    return run


def _in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a fresh process. Its errors come back as they are, or as ``ComparisonError``."""
    # Not a fork: a device that this process has used does not work in one.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            value, error = pool.submit(_guarded, work, arguments).result()
        except BrokenProcessPool as broken:
            raise ComparisonError(
                "the process of an engine ended without a word, as it does when memory runs out; ask for less, or"
                " compare on a larger device"
            ) from broken
    if error is not None:
        message, param = error
        raise ComparisonError(message) if param is None else InvalidRequestError(message, param=param)
    return value


def _guarded(work: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, tuple[str, str | None] | None]:
    """The result and None, or None and the error's text and parameter: not every exception can be pickled."""
    try:
        return work(*arguments), None
    except InvalidRequestError as error:
        return None, (str(error), error.param)
    except OmniError as error:
        return None, (str(error), None)
