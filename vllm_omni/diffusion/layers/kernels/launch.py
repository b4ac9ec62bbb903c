"""Starting a Triton kernel eagerly, from compiled code, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import wrap_triton


def traceable(kernel: Any) -> Any:
    """``kernel``, to be started as ``traceable(kernel)[grid](...)``, so that a compiler sees which kernel it is."""
    # TRITON_INTERPRET=1 makes another kind of object, which no compiler meets.
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def block_of(width: int) -> tuple[int, int]:
    """The block that holds a row of ``width`` values, and the warps that work on it."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def rows_of(x: torch.Tensor) -> int:
    """``[..., D] ->`` the number of its rows."""
    return x.numel() // x.shape[-1]
