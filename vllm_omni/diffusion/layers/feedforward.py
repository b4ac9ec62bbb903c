"""The feed-forward network of a transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.layers.linear import ColumnParallelLinear, RowParallelLinear


class GeluProjection(nn.Module):
    """A linear layer and GELU with the tanh approximation: one place for a fused kernel."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(input_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., I] -> [..., O]``."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, named ``net.0.proj`` and ``net.2`` as diffusers checkpoints do."""

    def __init__(self, hidden_size: int, expansion: int = 4) -> None:
        super().__init__()
        inner_size = expansion * hidden_size
        self.net = nn.ModuleList(
            [GeluProjection(hidden_size, inner_size), nn.Identity(), RowParallelLinear(inner_size, hidden_size)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``."""
        output: torch.Tensor = self.net[2](self.net[0](x))
        return output
