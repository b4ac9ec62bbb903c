"""How a linear layer holds its weight and computes; quantization has a way of its own.

Shapes: I input features, O output features, P features of a prefix, D of what comes behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from vllm_omni.diffusion.distributed.tensor_parallel import sum_over_ranks
from vllm_omni.diffusion.layers.operators import joint_linear_op, linear_gelu_op, linear_of_parts_op, on_gpu
from vllm_omni.diffusion.layers.peer_sums import summed_linear_op, summed_linears_op

if TYPE_CHECKING:
    from vllm_omni.diffusion.layers.linear import LinearBase


@dataclass(frozen=True)
class PendingInput:
    """The input of a linear layer before its last step, which quantization computes together with its own.

    It is ``x``, or GELU of x in its tanh approximation, behind ``prefix`` if there is one: ``[..., P + D]``.
    """

    x: torch.Tensor
    gelu: bool = False
    prefix: torch.Tensor | None = None

    @property
    def activated(self) -> torch.Tensor:
        """Without the prefix, ``[..., D]``."""
        return F.gelu(self.x, approximate="tanh") if self.gelu else self.x

    def after(self, prefix: torch.Tensor) -> PendingInput:
        """This input behind ``prefix [..., P]``."""
        return PendingInput(self.x, self.gelu, prefix)

    def joined(self) -> torch.Tensor:
        """``[..., P + D]``."""
        return self.activated if self.prefix is None else torch.cat([self.prefix, self.activated], dim=-1)


class LinearMethod:
    """How a linear layer holds its weight and computes. Quantization replaces it; this one is the plain product."""

    def create_weight(self, layer: LinearBase) -> None:
        """Give ``layer`` its ``weight``, uninitialised."""
        layer.weight = layer.parameter(torch.empty(layer.output_size, layer.input_size))

    def store_weight(self, layer: LinearBase, loaded: torch.Tensor, first_row: int) -> None:
        """Put ``loaded [R, I]`` into R rows of the layer's weight."""
        copy_weight(layer.weight.data.narrow(0, first_row, loaded.shape[0]), loaded)

    def apply(self, layer: LinearBase, x: torch.Tensor | PendingInput) -> torch.Tensor:
        """``[..., I] -> [..., O]``."""
        if isinstance(x, torch.Tensor):
            return F.linear(x, layer.weight, layer.bias)
        if x.prefix is None or not on_gpu(x.x):
            return F.linear(x.joined(), layer.weight, layer.bias)
        return linear_of_parts_op(x.prefix, x.activated, layer.weight, layer.bias)

    def apply_summed(self, layer: LinearBase, x: torch.Tensor | PendingInput) -> torch.Tensor:
        """:meth:`apply`, summed over the ranks of the layer."""
        if layer.tp.peers is None:
            return sum_over_ranks(self.apply(layer, x), layer.tp)
        return summed_linear_op(_parts(x), layer.weight, layer.bias, layer.tp.name)

    def apply_both_summed(
        self, layer: LinearBase, x: torch.Tensor | PendingInput, other: LinearBase, y: torch.Tensor | PendingInput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`apply_summed` of x and, with a layer of the same kind and size, of y."""
        of_x, of_y = _parts(x), _parts(y)
        if layer.tp.peers is None or layer.bias is None or len(of_x) + len(of_y) > 2:
            return self.apply_summed(layer, x), self.apply_summed(other, y)
        both = summed_linears_op(of_x[0], layer.weight, layer.bias, of_y[0], other.weight, other.bias, layer.tp.name)
        num_rows = of_x[0].numel() // of_x[0].shape[-1]
        return both[:num_rows].view(*of_x[0].shape[:-1], -1), both[num_rows:].view(*of_y[0].shape[:-1], -1)

    def apply_gelu(self, layer: LinearBase, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, PendingInput]:
        """The output features before ``start``, and those from there on with GELU (tanh approximation) to come."""
        if not on_gpu(x) or layer.bias is None:
            output = self.apply(layer, x)
            return output[..., :start], PendingInput(output[..., start:], gelu=True)
        activated = linear_gelu_op(x, layer.weight[start:], layer.bias[start:])
        before = F.linear(x, layer.weight[:start], layer.bias[:start]) if start else x[..., :0]
        return before, PendingInput(activated)

    def apply_joint(self, layer: LinearBase, x: torch.Tensor, other: LinearBase, y: torch.Tensor) -> torch.Tensor:
        """``x [B, T, I], y [B, S, I] -> [B, T + S, O]``: this layer of x, then the other, of the same kind, of y."""
        if on_gpu(x) and x.shape[0] == 1 and layer.bias is not None:
            return joint_linear_op(x, layer.weight, layer.bias, y, other.weight, other.bias)
        return torch.cat([self.apply(layer, x), self.apply(other, y)], dim=1)


def _parts(x: torch.Tensor | PendingInput) -> list[torch.Tensor]:
    """Input features one after the other, where joining them would copy them on a GPU."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [x.joined()] if x.prefix is None or not on_gpu(x.x) else [x.prefix, x.activated]


# Whether and how a layer of this many input and output features is quantized, and whether in its weights alone.
ChooseLinearMethod = Callable[[int, int, bool], LinearMethod]

_choose_method: ContextVar[ChooseLinearMethod | None] = ContextVar("linear_method", default=None)


@contextmanager
def linear_method(choose: ChooseLinearMethod | None) -> Iterator[None]:
    """Linear layers that are built within the block compute by what ``choose`` gives; None is the plain way.

    Some stay as they are: see :class:`ReplicatedLinear`.
    """
    token = _choose_method.set(choose)
    try:
        yield
    finally:
        _choose_method.reset(token)


def current_linear_method(input_size: int, output_size: int, weights_only: bool = False) -> LinearMethod:
    """The method that :func:`linear_method` chooses at the moment for a layer of this size."""
    choose = _choose_method.get()
    return LinearMethod() if choose is None else choose(input_size, output_size, weights_only)


def copy_weight(target: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy with conversion of dtype and device. Raises ``ValueError`` if the shapes differ."""
    if target.shape != loaded.shape:
        raise ValueError(f"shape {list(loaded.shape)} does not fit {list(target.shape)}")
    if target.is_cuda and loaded.device.type == "cpu" and not loaded.is_pinned():
        # A part of a mapped file: all threads read it into memory that the GPU can copy from by itself.
        loaded = torch.empty(loaded.shape, dtype=loaded.dtype, device="cpu", pin_memory=True).copy_(loaded)
    target.data.copy_(loaded)
