"""Triton kernels. Each has a twin in torch beside its caller: the reference, and what runs without a GPU or Triton."""

from __future__ import annotations

import importlib.util

import torch

# torch brings Triton along where it was built for GPUs.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def take(x: torch.Tensor) -> bool:
    """Whether the kernels run on tensors such as ``x``."""
    return HAS_TRITON and x.is_cuda
