"""What every benchmark records beside its figures, and how it writes them."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_omni.platforms import default_device, get_platform

_PACKAGES = ("torch", "diffusers", "transformers", "triton", "fa3-fwd", "vllm-omni")


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "hardware": get_platform(default_device()).name,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results with the environment they were measured in."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
        print(f"written to {path}")


def alternate(candidates: dict[str, Callable[[], Any]], num_trials: int) -> dict[str, list[float]]:
    """Seconds of each trial of each candidate. They take turns, so that a drift of the machine touches all alike.

    Each candidate runs once before, unmeasured.
    """
    device = get_platform(default_device())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(num_trials + 1):
        for name, run in candidates.items():
            device.synchronize()
            started = time.perf_counter()
            run()
            device.synchronize()
            if trial > 0:
                times[name].append(time.perf_counter() - started)
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)
