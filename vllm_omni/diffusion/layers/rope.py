"""Rotary position embedding (arXiv:2104.09864) in real arithmetic.

Shapes: B batch, S tokens, H heads, D head size. Angles come as ``cos`` and ``sin`` of ``[S, D / 2]`` in float32.
Complex arithmetic would be shorter, but compilers generate no code for it.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.layers.norm import RMSNorm


def rope_angles(positions: torch.Tensor, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """``positions [S] -> angles [S, dim / 2]`` in float32: ``position / theta ** (2 i / dim)``."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return torch.outer(positions.float(), 1.0 / theta**exponents)


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features by position-dependent angles.

    ``is_neox_style`` pairs feature i with i + D/2 (as GPT-NeoX does); else neighbours 2i and 2i + 1 form a pair.
    """

    def __init__(self, is_neox_style: bool = False) -> None:
        super().__init__()
        self.is_neox_style = is_neox_style

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``x [B, S, H, D], cos [S, D / 2], sin [S, D / 2] -> [B, S, H, D]``, computed in float32."""
        first, second = _pairs(x.float(), self.is_neox_style)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = (first * cos - second * sin, first * sin + second * cos)
        if self.is_neox_style:
            return torch.cat(rotated, dim=-1).to(x.dtype)
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


class QKNormRope(nn.Module):
    """RMS normalisation of the heads of query and key, then the rotation of both: one place for a fused kernel."""

    def __init__(self, is_neox_style: bool = False) -> None:
        super().__init__()
        self.rotary = RotaryEmbedding(is_neox_style)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        norm_query: RMSNorm,
        norm_key: RMSNorm,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``query [B, S, H, D], key [B, S, G, D], cos and sin [S, D / 2] -> query, key`` of the same shapes."""
        query, key = norm_query(query), norm_key(key)
        num_heads = query.shape[2]
        # One rotation of both: half the launches, and the angles are read once.
        rotated = self.rotary(torch.cat([query, key], dim=2), cos, sin)
        return rotated[:, :, :num_heads], rotated[:, :, num_heads:]


def _pairs(x: torch.Tensor, is_neox_style: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if is_neox_style:
        first, second = x.chunk(2, dim=-1)
        return first, second
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second
