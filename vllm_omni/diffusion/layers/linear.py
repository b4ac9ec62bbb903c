"""Linear layers that know how to load and shard themselves.

A layer is told once how its weight is split over the ranks of a tensor-parallel group; loading then takes just this
rank's part from the file. Fused layers declare the checkpoint's names of their parts (``checkpoint_names``), so
fusing is data for the loader and not code in a model.

Shapes: I input features, O output features; weights are ``[O, I]`` as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from vllm_omni.diffusion.distributed.tensor_parallel import (
    SINGLE_RANK,
    TensorParallelRank,
    current_tensor_parallel_rank,
)
from vllm_omni.diffusion.layers.linear_method import LinearMethod, PendingInput, copy_weight, current_linear_method

# (parameter, tensor from the checkpoint, name of the part in a fused parameter)
WeightLoader = Callable[[nn.Parameter, torch.Tensor, str | None], None]


class LinearBase(nn.Module):
    """Weight and bias of one rank, left uninitialised: a checkpoint fills them."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallelRank) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.tp = tp
        self.linear_method = self._choose_linear_method()
        self.linear_method.create_weight(self)
        self.bias = self.parameter(torch.empty(output_size)) if bias else None

    def _choose_linear_method(self) -> LinearMethod:
        return current_linear_method(self.input_size, self.output_size)

    def parameter(self, values: torch.Tensor) -> nn.Parameter:
        """A parameter that loads by this layer's :meth:`load_parameter`."""
        parameter = nn.Parameter(values, requires_grad=False)
        parameter.weight_loader = self.load_parameter  # type: ignore[attr-defined]
        return parameter

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        """Copy ``loaded``, a whole tensor of the checkpoint, into this rank's parameter."""
        self._store(parameter, loaded)

    def _store(
        self, parameter: nn.Parameter, loaded: torch.Tensor, first_row: int = 0, rows: int | None = None
    ) -> None:
        """Copy ``loaded`` into ``rows`` rows of the weight, or entries of the bias; into all if no number is given."""
        expected = (parameter.shape[0] if rows is None else rows, *parameter.shape[1:])
        if loaded.shape != expected:
            raise ValueError(f"shape {list(loaded.shape)} does not fit {list(expected)}")
        if parameter.dim() == 1:
            copy_weight(parameter.data.narrow(0, first_row, expected[0]), loaded)
        else:
            self.linear_method.store_weight(self, loaded, first_row)

    def forward(self, x: torch.Tensor | PendingInput) -> torch.Tensor:
        return self.linear_method.apply(self, x)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, tp={self.tp.rank}/{self.tp.size}"


class ReplicatedLinear(LinearBase):
    """The whole layer on every rank, never quantized.

    It is for what has little work or wants its precision: embeddings of inputs, the last projection.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = True) -> None:
        super().__init__(input_size, output_size, bias, SINGLE_RANK)

    def _choose_linear_method(self) -> LinearMethod:
        return LinearMethod()


class ModulationLinear(LinearBase):
    """The whole layer on every rank, over one row per picture: its time is that of reading the weight.

    Quantization reaches its weight alone. Its output may be known before the forward: ``modulations.py`` prepares those
    of a block's layers as one row, of which this layer's begins at ``prepared_at``.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = True) -> None:
        super().__init__(input_size, output_size, bias, SINGLE_RANK)
        self.prepared_at = 0

    def forward(self, x: torch.Tensor | PendingInput) -> torch.Tensor:
        """``[B, I] -> [B, O]``; of a prepared row ``[B, P]``, which is never I wide, its part ``[B, O]``."""
        if isinstance(x, torch.Tensor) and x.shape[-1] != self.input_size:
            return x.narrow(-1, self.prepared_at, self.output_size)
        return super().forward(x)

    def _choose_linear_method(self) -> LinearMethod:
        return current_linear_method(self.input_size, self.output_size, weights_only=True)


class ColumnParallelLinear(LinearBase):
    """Output features are split over the ranks; each keeps its own part of the output."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, tp: TensorParallelRank | None = None
    ) -> None:
        tp = current_tensor_parallel_rank() if tp is None else tp
        super().__init__(input_size, tp.divide(output_size, "output_size"), bias, tp)

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        self._store(parameter, self.tp.shard(loaded, 0, "output_size"))


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel layers over the same input as one product; the output holds them one after the other.

    ``checkpoint_names`` are the names of the parts beside this layer, as in ``("gate_proj", "up_proj")``.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        checkpoint_names: Sequence[str] = (),
        tp: TensorParallelRank | None = None,
    ) -> None:
        if checkpoint_names and len(checkpoint_names) != len(output_sizes):
            raise ValueError(f"{len(checkpoint_names)} checkpoint_names do not match {len(output_sizes)} output_sizes")
        tp = current_tensor_parallel_rank() if tp is None else tp
        self.output_sizes = [tp.divide(size, "output_size") for size in output_sizes]
        self.checkpoint_names = tuple(checkpoint_names)
        super().__init__(input_size, sum(self.output_sizes), bias, tp)

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        if part is None:
            self._load_fused(parameter, loaded)
            return
        index = self.checkpoint_names.index(part)
        first_row, rows = sum(self.output_sizes[:index]), self.output_sizes[index]
        self._store(parameter, self.tp.shard(loaded, 0, "output_size"), first_row, rows)

    def _load_fused(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        """A checkpoint that stores the parts fused already."""
        if loaded.shape[0] != sum(self.output_sizes) * self.tp.size:
            raise ValueError(f"shape {list(loaded.shape)} does not hold {self.output_sizes} x {self.tp.size} ranks")
        parts = loaded.split([size * self.tp.size for size in self.output_sizes], dim=0)
        self._store(parameter, torch.cat([self.tp.shard(values, 0, "output_size") for values in parts]))

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[..., sum(O_i)] -> ([..., O_1], [..., O_2], ...)``; views."""
        return output.split(self.output_sizes, dim=-1)

    def split_gelu(self, x: torch.Tensor) -> tuple[torch.Tensor, PendingInput]:
        """``x [..., I]`` -> the output of all parts but the last, and that of the last with GELU."""
        return self.linear_method.apply_gelu(self, x, sum(self.output_sizes[:-1]))


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections as one product, split by heads over the ranks."""

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        *,
        checkpoint_names: Sequence[str] = ("to_q", "to_k", "to_v"),
        tp: TensorParallelRank | None = None,
    ) -> None:
        tp = current_tensor_parallel_rank() if tp is None else tp
        total_num_kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        self.head_size = head_size
        self.num_heads = tp.divide(total_num_heads, "num_heads")
        self.num_kv_heads = tp.divide(total_num_kv_heads, "num_kv_heads")
        sizes = [heads * head_size for heads in (total_num_heads, total_num_kv_heads, total_num_kv_heads)]
        super().__init__(hidden_size, sizes, bias, checkpoint_names=checkpoint_names, tp=tp)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[B, S, I] -> query [B, S, H, D], key [B, S, G, D], value [B, S, G, D]``; views of one product."""
        query, key, value = self.split(self(x))
        return (
            query.unflatten(-1, (self.num_heads, self.head_size)),
            key.unflatten(-1, (self.num_kv_heads, self.head_size)),
            value.unflatten(-1, (self.num_kv_heads, self.head_size)),
        )


class RowParallelLinear(LinearBase):
    """Input features are split over the ranks; the partial products are summed over them.

    The first rank alone adds the bias: that of the others is zero.
    """

    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, tp: TensorParallelRank | None = None
    ) -> None:
        tp = current_tensor_parallel_rank() if tp is None else tp
        super().__init__(tp.divide(input_size, "input_size"), output_size, bias, tp)

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        if parameter.dim() == 1:
            self._load_bias(parameter, loaded)
        else:
            self._store(parameter, self.tp.shard(loaded, 1, "input_size"))

    def _load_bias(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        self._store(parameter, loaded if self.tp.rank == 0 else torch.zeros_like(loaded))

    def forward(self, x: torch.Tensor | PendingInput) -> torch.Tensor:
        return self.linear_method.apply_summed(self, x)


def both_summed(
    layer: nn.Module, x: torch.Tensor | PendingInput, other: nn.Module, y: torch.Tensor | PendingInput
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer(x), other(y)``, of row-parallel layers of the same size; the ranks may wait for each other once."""
    assert isinstance(layer, RowParallelLinear)
    assert isinstance(other, RowParallelLinear)
    return layer.linear_method.apply_both_summed(layer, x, other, y)


class MergedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer over the outputs of several column-parallel ones, one after the other.

    Each of them is split over the ranks for itself, and so are the columns of the weight that belong to it.
    """

    def __init__(
        self, input_sizes: Sequence[int], output_size: int, bias: bool = True, *, tp: TensorParallelRank | None = None
    ) -> None:
        self.input_sizes = tuple(input_sizes)  # of all ranks together
        super().__init__(sum(input_sizes), output_size, bias, tp=tp)

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        if parameter.dim() == 1:
            self._load_bias(parameter, loaded)
            return
        if loaded.shape[1] != sum(self.input_sizes):
            raise ValueError(f"shape {list(loaded.shape)} does not hold inputs of {self.input_sizes}")
        blocks = loaded.split(self.input_sizes, dim=1)
        self._store(parameter, torch.cat([self.tp.shard(block, 1, "input_size") for block in blocks], dim=1))
