"""What all kernels need: to be operators of torch, and a block that holds a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

# An operator is opaque to a compiler. Traced as what it is, a kernel would be started by compiled code, which knows less
# about its arguments: loads then were 2 bytes wide instead of 16, and a norm took 2.7 times as long.
_LIBRARY = torch.library.Library("vllm_omni", "FRAGMENT")


def operator(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``torch.ops.vllm_omni.<name of function>``; ``fake`` gives its outputs without values."""
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_omni::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vllm_omni, name)


def block_of(width: int) -> tuple[int, int]:
    """The block that holds a row of ``width`` values, and the warps that work on it."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def rows_of(x: torch.Tensor) -> int:
    """``[..., D] ->`` the number of its rows."""
    return x.numel() // x.shape[-1]
