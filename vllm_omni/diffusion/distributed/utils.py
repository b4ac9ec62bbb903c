"""The device of the current rank, as the model guide asks for it: ``get_local_device()``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from vllm_omni.platforms import default_device

_local_device: ContextVar[torch.device | None] = ContextVar("local_device", default=None)


def get_local_device() -> torch.device:
    """The device that this rank computes on; outside of a worker, the default device of the machine."""
    return _local_device.get() or default_device()


@contextmanager
def local_device(device: torch.device) -> Iterator[None]:
    """Make ``device`` the answer of ``get_local_device`` within the block. A worker holds it while it works."""
    token = _local_device.set(device)
    try:
        yield
    finally:
        _local_device.reset(token)
