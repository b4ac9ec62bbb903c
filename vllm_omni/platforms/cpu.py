"""The CPU: the reference platform, and the one that tests run on."""

from __future__ import annotations

import os
import platform as python_platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def _status_bytes(name: str) -> int:
    """A size of this process that the kernel keeps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class CpuPlatform:
    device: torch.device

    @property
    def default_dtype(self) -> torch.dtype:
        # Few CPUs run bf16 faster than float32, and float32 gives the pictures of the reference.
        return torch.float32

    @property
    def name(self) -> str:
        return f"{python_platform.machine()} CPU, {os.cpu_count()} cores"

    def why_no_fp8(self) -> str | None:
        return "a CPU has no FP8 arithmetic"

    def free_memory(self) -> int:
        # MemAvailable counts reclaimable caches as free, which sysconf's free pages do not.
        meminfo = Path("/proc/meminfo")
        if meminfo.exists():
            for line in meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """The kernel keeps one peak per process and offers no reset."""

    def watch_memory(self) -> Callable[[], int]:
        try:
            # The kernel starts the high-water mark of this process anew (proc(5), clear_refs).
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
        except OSError:
            return lambda: 0
        return lambda: max(0, _status_bytes("VmHWM") - before)

    def synchronize(self) -> None:
        """CPU work is done when the call returns."""

    def record(self) -> Callable[[], None]:
        return self.synchronize

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache of ours."""
