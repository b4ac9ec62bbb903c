"""Normalisation without and with modulation.

Shapes: B batch, S tokens, D features, ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``, computed in float32."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise without weights, then ``* (1 + scale) + shift`` (adaLN, arXiv:2212.09748).

    ``x [B, S, D], scale [B or 1, S or 1, D], shift likewise -> [B, S, D]``.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gated_residual(residual: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """``residual [B, S, D] + gate [B or 1, S or 1, D] * update [B, S, D] -> [B, S, D]``."""
    return torch.addcmul(residual, gate, update)
