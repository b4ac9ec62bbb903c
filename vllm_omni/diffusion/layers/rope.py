"""Rotary position embedding (arXiv:2104.09864) in real arithmetic.

Shapes: B batch, S tokens, H heads, D head size. Angles come as ``cos`` and ``sin`` of ``[S, D / 2]`` in float32.
Complex arithmetic would be shorter, but compilers generate no code for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vllm_omni.diffusion.attention.fp8 import ScaledHeads, is_fp8_attention, quantize_heads, quantized, scale_of
from vllm_omni.diffusion.layers import kernels
from vllm_omni.diffusion.layers.norm import RMSNorm, largest_outputs


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


@dataclass(frozen=True)
class TextNorms:
    """Norms of the text tokens, which are the first ``num_tokens`` of a joint sequence."""

    query: RMSNorm
    key: RMSNorm
    num_tokens: int


class QKNormRope(nn.Module):
    """RMS normalisation of query and key, then their rotation, from the output of a fused projection.

    The norms are of single heads, ``D`` weights, or of all heads together, ``H * D`` and ``G * D``. Text tokens of a
    joint sequence may have norms of their own. For attention in FP8 it hands out heads in FP8: query and key with the
    scale that their norms bound them by, value with that of the largest value of each head.
    """

    def __init__(self, num_heads: int, num_kv_heads: int | None = None, *, is_neox_style: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.rotary = RotaryEmbedding(is_neox_style)
        self._is_fp8 = is_fp8_attention()

    def forward(
        self,
        qkv: torch.Tensor,
        norm_query: RMSNorm,
        norm_key: RMSNorm,
        rope: tuple[torch.Tensor, torch.Tensor],
        text: TextNorms | None = None,
    ) -> tuple[torch.Tensor, ...] | tuple[ScaledHeads, ...]:
        """``qkv [B, S, (H + 2 G) * D], rope [S, D / 2] x 2 -> query [B, S, H, D], key and value [B, S, G, D]``."""
        head_size = 2 * rope[0].shape[-1]
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = (
            part.unflatten(-1, (-1, head_size)) for part in qkv.split([n * head_size for n in heads], dim=-1)
        )
        first = TextNorms(norm_query, norm_key, 0) if text is None else text
        scales = None
        if self._is_fp8:
            # No value exceeds what the norms let through, so that the scales need no look at the tokens.
            scales = scale_of(largest_outputs((norm_query, first.query), (norm_key, first.key)))
        if kernels.take(qkv) and not norm_query.spans_ranks:
            from vllm_omni.diffusion.layers.kernels.rope import qk_norm_rope_op

            query, key = qk_norm_rope_op(
                qkv,
                norm_query.weight,
                norm_key.weight,
                first.query.weight,
                first.key.weight,
                *rope,
                self.num_heads,
                self.num_kv_heads,
                first.num_tokens,
                norm_query.eps,
                self.rotary.is_neox_style,
                scales,
            )
        else:
            normalized = _normalized(query, key, norm_query, norm_key)
            if text is not None:
                tokens = slice(text.num_tokens)
                both = [_normalized(query[:, tokens], key[:, tokens], text.query, text.key)]
                both.append(normalized[:, text.num_tokens :])
                normalized = torch.cat(both, dim=1)
            # One rotation of both: half the launches, and the angles are read once.
            rotated = self.rotary(normalized, *rope)
            query, key = rotated[:, :, : self.num_heads], rotated[:, :, self.num_heads :]
            if scales is not None:
                query, key = quantized(query, scales[0]), quantized(key, scales[1])
        if scales is None:
            return query, key, value
        query_scale, key_scale = (scale.expand(qkv.shape[0], self.num_kv_heads) for scale in scales)
        return (
            ScaledHeads(query, query_scale, qkv.dtype),
            ScaledHeads(key, key_scale, qkv.dtype),
            quantize_heads(value),
        )


def _normalized(query: torch.Tensor, key: torch.Tensor, norm_query: RMSNorm, norm_key: RMSNorm) -> torch.Tensor:
    """``query [B, S, H, D], key [B, S, G, D] -> [B, S, H + G, D]``."""
    parts = []
    for x, norm in ((query, norm_query), (key, norm_key)):
        per_head = norm.weight.shape[0] == x.shape[-1]
        parts.append(norm(x) if per_head else norm(x.flatten(2)).unflatten(-1, x.shape[2:]))
    return torch.cat(parts, dim=2)


def _pairs(x: torch.Tensor, is_neox_style: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if is_neox_style:
        first, second = x.chunk(2, dim=-1)
        return first, second
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second
