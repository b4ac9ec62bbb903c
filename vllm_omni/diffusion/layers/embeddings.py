"""Embeddings of scalars.

Shapes: B batch, C sinusoidal channels, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.layers.linear import ReplicatedLinear


def sinusoidal_embedding(
    values: torch.Tensor, num_channels: int, scale: float = 1.0, max_period: float = 10000.0
) -> torch.Tensor:
    """``values [B] -> [B, C]`` in float32: cosines, then sines, of geometrically spaced frequencies (arXiv:2006.11239).

    ``scale`` multiplies the angles last: multiplied into ``values`` first, rounding would differ from checkpoints'.
    """
    half = num_channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) * (-math.log(max_period) / half)
    angles = scale * (values.float()[:, None] * torch.exp(exponents))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them, named as diffusers checkpoints name them."""

    def __init__(self, num_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(num_channels, embedding_dim)
        self.linear_2 = ReplicatedLinear(embedding_dim, embedding_dim)

    def forward(self, sinusoids: torch.Tensor) -> torch.Tensor:
        """``[B, C] -> [B, D]``."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))
