"""Collectives of tensor parallelism, which compilers can trace.

Shapes: ``...`` anything, D features of this rank.
"""

from __future__ import annotations

import torch

from vllm_omni.diffusion.distributed.groups import (
    SINGLE_RANK,
    TensorParallelRank,
    current_tensor_parallel_rank,
    tensor_parallel_rank,
)
from vllm_omni.diffusion.distributed.rank_status import waiting_for

__all__ = [
    "SINGLE_RANK",
    "TensorParallelRank",
    "current_tensor_parallel_rank",
    "sum_over_ranks",
    "tensor_parallel_rank",
]


def sum_over_ranks(x: torch.Tensor, tp: TensorParallelRank) -> torch.Tensor:
    """``[...] -> [...]``: the sum of the ranks' tensors, on every rank."""
    if tp.size == 1:
        return x
    if torch.compiler.is_compiling():
        return _sum(x, tp.name)
    with waiting_for("ranks"):
        return _sum(x, tp.name)


def _sum(x: torch.Tensor, group_name: str) -> torch.Tensor:
    summed: torch.Tensor = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    )
    return summed
