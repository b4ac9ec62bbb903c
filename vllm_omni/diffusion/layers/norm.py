"""Normalisation without and with modulation.

Shapes: B batch, S tokens, D features, ``...`` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.distributed.tensor_parallel import (
    TensorParallelRank,
    current_tensor_parallel_rank,
    sum_over_ranks,
)
from vllm_omni.diffusion.layers import kernels


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension (arXiv:1910.07467)."""

    spans_ranks = False  # whether other ranks have features that count; kernels see those of one

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``, computed in float32."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class ColumnParallelRMSNorm(RMSNorm):
    """RMS normalisation over all features of a column-parallel layer, of which a rank holds its own.

    ``hidden_size`` counts those of all ranks.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, tp: TensorParallelRank | None = None) -> None:
        self.tp = current_tensor_parallel_rank() if tp is None else tp
        super().__init__(self.tp.divide(hidden_size, "hidden_size"), eps)
        self.hidden_size = hidden_size
        self.spans_ranks = self.tp.size > 1
        self.weight.weight_loader = self.load_parameter  # type: ignore[attr-defined]

    def load_parameter(self, parameter: nn.Parameter, loaded: torch.Tensor, part: str | None = None) -> None:
        """Copy this rank's part of ``loaded``, the whole weight."""
        parameter.data.copy_(self.tp.shard(loaded, 0, "hidden_size"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D of this rank] -> [..., D of this rank]``, computed in float32."""
        if self.tp.size == 1:
            return super().forward(x)
        squares = sum_over_ranks(x.float().square().sum(dim=-1, keepdim=True), self.tp)
        normalised = x.float() * torch.rsqrt(squares / self.hidden_size + self.eps)
        return (normalised * self.weight.float()).to(x.dtype)


def largest_outputs(*groups: Sequence[RMSNorm]) -> torch.Tensor:
    """The largest absolute value that an output of any norm of a group can have, ``[number of groups]`` in float32.

    A normalised feature is at most the norm of all, which is the root of their number. The norms are of one size.
    """
    weights = torch.stack([torch.cat([norm.weight for norm in group]) for group in groups])
    return weights.float().abs().amax(dim=1) * groups[0][0].hidden_size ** 0.5


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise without weights, then ``* (1 + scale) + shift`` (adaLN, arXiv:2212.09748).

    ``x [B, S, D], scale [B or 1, S or 1, D], shift likewise -> [B, S, D]`` in x's dtype. A dimension more is possible:
    ``x [B, G, S, D], scale [B, G, 1, D]``.
    """
    if kernels.take(x):
        from vllm_omni.diffusion.layers.kernels import norm

        output: torch.Tensor = norm.layer_norm_modulate_op(x, _by_group(scale, x), _by_group(shift, x), eps, False)[0]
        return output
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)


def gated_residual(residual: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """``residual [B, S, D] + gate [B or 1, S or 1, D] * update [B, S, D] -> [B, S, D]`` in the residual's dtype."""
    return torch.addcmul(residual, gate, update).to(residual.dtype)


def gated_residual_norm_modulate(
    residual: torch.Tensor,
    gate: torch.Tensor,
    update: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gated_residual`, and :func:`layer_norm_modulate` of it; shapes as there."""
    if kernels.take(residual):
        from vllm_omni.diffusion.layers.kernels import norm

        grouped = (_by_group(values, residual) for values in (gate, scale, shift))
        gate, scale, shift = grouped
        summed, output, _ = norm.gated_residual_norm_modulate_op(residual, gate, update, scale, shift, eps, False)
        return summed, output
    summed = gated_residual(residual, gate, update)
    return summed, layer_norm_modulate(summed, scale, shift, eps)


def _by_group(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[..., D] -> [G, D]``: one row for each of G runs of consecutive rows of ``x``; a view."""
    assert values.shape[0] == x.shape[0] or values[..., 0].numel() == 1, "rows of a batch have values of their own"
    return values.flatten(0, -2)
