"""A row-parallel layer whose input is several column-parallel outputs."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.distributed.tensor_parallel import TensorParallelRank
from vllm_omni.diffusion.layers.linear import MergedColumnParallelLinear, MergedRowParallelLinear


def test_the_partial_products_of_two_ranks_add_up_to_the_whole_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, x = torch.randn(4, 6, generator=generator), torch.randn(8, 6, generator=generator), torch.randn(3, 6)
    weight = torch.randn(5, 12, generator=generator)
    expected = torch.cat([x @ first.T, x @ second.T], dim=-1) @ weight.T
    total = torch.zeros(3, 5)
    for rank in range(2):
        tp = TensorParallelRank(rank, 2)
        columns = MergedColumnParallelLinear(6, (4, 8), bias=False, checkpoint_names=("first", "second"), tp=tp)
        columns.load_parameter(columns.weight, first, "first")
        columns.load_parameter(columns.weight, second, "second")
        rows = MergedRowParallelLinear((4, 8), 5, bias=False, tp=tp)
        rows.load_parameter(rows.weight, weight)
        total += columns(x) @ rows.weight.T
    torch.testing.assert_close(total, expected)


def test_a_weight_of_another_width_is_refused() -> None:
    layer = MergedRowParallelLinear((4, 8), 5)
    with pytest.raises(ValueError, match=r"\[5, 13\] does not hold inputs of \(4, 8\)"):
        layer.load_parameter(layer.weight, torch.zeros(5, 13))
