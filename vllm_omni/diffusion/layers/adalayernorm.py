"""Adaptive layer normalisation (adaLN, arXiv:2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.layers.linear import ReplicatedLinear
from vllm_omni.diffusion.layers.norm import gated_residual_norm_modulate, layer_norm_modulate


class AdaLayerNorm(nn.Module):
    """Layer normalisation without weights, modulated by ``(shift, scale, gate)``."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: torch.Tensor, mod_params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x [B, S, D], mod_params [B, 3 * D] -> modulated [B, S, D], gate [B, 1, D]``.

        ``mod_params`` holds shift, scale and gate, in this order. It may also be ``[B, S, 3 * D]``, one for each
        token; then the gate is ``[B, S, D]``.
        """
        shift, scale, gate = _by_token(mod_params).chunk(3, dim=-1)
        return layer_norm_modulate(x, scale, shift, self.eps), gate

    def after_gate(
        self, residual: torch.Tensor, gate: torch.Tensor, update: torch.Tensor, mod_params: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``residual + gate * update [B, S, D]``, and what :meth:`forward` makes of it: modulated, and the next gate.

        ``residual and update [B, S, D], gate [B, 1 or S, D]``, ``mod_params`` as there.
        """
        shift, scale, next_gate = _by_token(mod_params).chunk(3, dim=-1)
        summed, modulated = gated_residual_norm_modulate(residual, gate, update, scale, shift, self.eps)
        return summed, modulated, next_gate


def _by_token(mod_params: torch.Tensor) -> torch.Tensor:
    """``[B, M] -> [B, 1, M]``; ``[B, S, M]`` as it is."""
    return mod_params if mod_params.dim() == 3 else mod_params.unsqueeze(1)


class AdaLayerNormContinuous(nn.Module):
    """Layer normalisation whose scale and shift are projected from a conditioning vector."""

    def __init__(self, hidden_size: int, conditioning_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(conditioning_size, 2 * hidden_size)
        self.eps = eps

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """``x [B, S, D], conditioning [B, C] -> [B, S, D]``. The projection holds scale first, then shift."""
        scale, shift = self.linear(F.silu(conditioning)).unsqueeze(1).chunk(2, dim=-1)
        return layer_norm_modulate(x, scale, shift, self.eps)
