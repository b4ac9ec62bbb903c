"""The questions that the engine asks a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Platform(Protocol):
    """A device and what it can do. Sizes are in bytes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def default_dtype(self) -> torch.dtype:
        """The dtype of ``dtype="auto"``."""
        ...

    @property
    def name(self) -> str:
        """The hardware's name, for receipts and reports."""
        ...

    def why_no_fp8(self) -> str | None:
        """Why the device has no products of FP8 numbers, or None if it has."""
        ...

    def free_memory(self) -> int:
        """Memory that a new allocation can take now."""
        ...

    def peak_memory(self) -> int:
        """The most memory held since ``reset_peak_memory``; on a CPU, since the process started."""
        ...

    def reset_peak_memory(self) -> None: ...

    def watch_memory(self) -> Callable[[], int]:
        """Begin to watch; calling the result gives the most memory held since then, above what was held then.

        It starts ``peak_memory`` anew.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all work that was queued on the device is done."""
        ...

    def record(self) -> Callable[[], None]:
        """Mark this point in the queue of work; calling the result waits until the device has reached it."""
        ...

    def empty_cache(self) -> None:
        """Give cached but unused memory back."""
        ...
