"""NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CudaPlatform:
    device: torch.device

    @property
    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def why_no_fp8(self) -> str | None:
        major, minor = torch.cuda.get_device_capability(self.device)
        if (major, minor) >= (8, 9):
            return None
        return f"it needs compute capability 8.9 or newer (Ada, Hopper, Blackwell), the GPU has {major}.{minor}"

    def free_memory(self) -> int:
        # Blocks that torch holds without using them can be handed out again.
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def watch_memory(self) -> Callable[[], int]:
        before = torch.cuda.memory_allocated(self.device)
        self.reset_peak_memory()
        return lambda: self.peak_memory() - before

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def record(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()
