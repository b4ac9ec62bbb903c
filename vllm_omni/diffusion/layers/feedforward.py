"""The feed-forward network of a transformer block."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.layers.linear import ColumnParallelLinear, RowParallelLinear, both_summed
from vllm_omni.diffusion.layers.linear_method import PendingInput

GeluKind = Literal["tanh", "none"]


class GeluProjection(nn.Module):
    """A linear layer and GELU, with the tanh approximation or exact ("none")."""

    def __init__(self, input_size: int, output_size: int, approximate: GeluKind = "tanh") -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(input_size, output_size)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> PendingInput:
        """``[..., I] -> [..., O]``, as the input of the next linear layer."""
        if self.approximate == "none":
            return PendingInput(F.gelu(self.proj(x)))
        return self.proj.linear_method.apply_gelu(self.proj, x)[1]


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, named ``net.0.proj`` and ``net.2`` as diffusers checkpoints do.

    The inner size is ``expansion`` times the hidden size, or ``inner_size``; the output's is the hidden size, or
    ``output_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        expansion: int = 4,
        *,
        inner_size: int | None = None,
        output_size: int | None = None,
        approximate: GeluKind = "tanh",
    ) -> None:
        super().__init__()
        inner_size = expansion * hidden_size if inner_size is None else inner_size
        output_size = hidden_size if output_size is None else output_size
        self.net = nn.ModuleList(
            [
                GeluProjection(hidden_size, inner_size, approximate),
                nn.Identity(),
                RowParallelLinear(inner_size, output_size),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., O]``."""
        output: torch.Tensor = self.net[2](self.net[0](x))
        return output

    def with_other(self, x: torch.Tensor, other: FeedForward, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This network of x and the other, of the same size, of y: ranks wait for each other once."""
        return both_summed(self.net[2], self.net[0](x), other.net[2], other.net[0](y))
