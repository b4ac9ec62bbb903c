"""The clock and the power of a GPU while it works, as nvidia-smi reports them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import median

_FIELDS = ("clocks.sm", "power.draw.instant", "clocks_event_reasons.sw_power_cap", "temperature.gpu")
_INTERVAL_MS = 20
_STARTUP_S = 1.5  # of nvidia-smi


def clocks_while(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Repeat ``work`` on the GPU. The median clock in MHz and power in W of its second half, when both have settled.

    ``power_capped`` is the share of samples in which the driver says that it lowers the clock for the power's sake.
    Empty where nvidia-smi does not tell.
    """
    uuid = torch.cuda.get_device_properties(0).uuid
    command = [
        *("nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={','.join(_FIELDS)}"),
        *("--format=csv,noheader,nounits", "-lms", str(_INTERVAL_MS)),
    ]
    if shutil.which(command[0]) is None:
        return {}
    if shutil.which("stdbuf") is not None:
        command = ["stdbuf", "-oL", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sampler:
        assert sampler.stdout is not None
        deadline = time.perf_counter() + _STARTUP_S
        while time.perf_counter() < deadline:  # busy, so that the clock is what it is in a long run
            work()
            torch.cuda.synchronize()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        sampler.terminate()
        lines = sampler.stdout.read().splitlines()
    samples = [line.split(", ") for line in lines if line.count(", ") == len(_FIELDS) - 1]
    samples = samples[len(samples) // 2 :]
    try:
        return {
            "clock_mhz": median([float(sample[0]) for sample in samples]),
            "power_w": median([float(sample[1]) for sample in samples]),
            "power_capped": sum(sample[2] == "Active" for sample in samples) / len(samples),
            "temperature_c": float(samples[-1][3]),
            "clock_samples": len(samples),
        }
    except (ValueError, IndexError, ZeroDivisionError):
        return {"clocks_error": " | ".join(lines[:2])}
