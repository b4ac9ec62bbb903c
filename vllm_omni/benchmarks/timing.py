"""Measuring seconds, and telling what they were measured on."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_omni.platforms import default_device, get_platform
from vllm_omni.version import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "triton", "fa3-fwd", "lpips")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions; the device is the default one if none is given."""
    versions = {"vllm-omni": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "hardware": get_platform(default_device() if device is None else device).name,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    num_trials: int,
    *,
    num_warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Seconds of each trial of each candidate. They take turns, so that a drift of the machine touches all alike.

    Each candidate runs ``num_warmup`` times before, unmeasured.
    """
    synchronize = get_platform(default_device() if device is None else device).synchronize
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(num_warmup + num_trials):
        for name, run in candidates.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if trial >= num_warmup:
                times[name].append(time.perf_counter() - started)
    return times


@dataclass(frozen=True, kw_only=True)
class LatencySummary:
    """Seconds over several trials. ``p90_s`` interpolates between trials, so that few of them give a value too."""

    median_s: float
    p90_s: float
    min_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> LatencySummary:
        """The summary of at least one trial."""
        return cls(
            median_s=median(seconds),
            p90_s=float(np.quantile(seconds, 0.9)),
            min_s=min(seconds),
            max_s=max(seconds),
        )


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results with the environment that they were measured in, unless they bring one; no path, no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **results}, indent=2, allow_nan=False) + "\n")
