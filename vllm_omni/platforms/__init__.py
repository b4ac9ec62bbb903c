"""What a device can do: one small object per kind of device, chosen by ``get_platform``."""

from __future__ import annotations

import torch

from vllm_omni.platforms.cpu import CpuPlatform
from vllm_omni.platforms.cuda import CudaPlatform
from vllm_omni.platforms.interface import Platform

__all__ = ["Platform", "default_device", "get_platform"]


def default_device() -> torch.device:
    """The device that is used when none is named: the first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def get_platform(device: torch.device) -> Platform:
    """The platform of a device. Raises ``ValueError`` for a kind that is not supported."""
    if device.type == "cpu":
        return CpuPlatform(device)
    if device.type == "cuda":
        return CudaPlatform(device)
    raise ValueError(f"device={str(device)!r} is not supported; use 'cpu', 'cuda' or 'cuda:<index>'")
