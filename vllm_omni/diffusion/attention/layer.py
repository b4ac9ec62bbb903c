"""The attention layer that every model uses.

Shapes: B batch, S query tokens, K key tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.selector import requested_backend, select_backend

__all__ = ["Attention", "AttentionMetadata"]


class _UsedBackends:
    """Has an attribute by the name of each backend that ran.

    It is written and never read in ``forward``: what a trace had read would be guarded, and a first use retraced.
    """


class Attention(nn.Module):
    """Scaled dot-product attention on whichever backend was chosen.

    ``num_heads`` and ``num_kv_heads`` count the heads of this rank. It holds no weights.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        self.causal = causal
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        self.prefix = prefix
        self._requested = requested_backend()
        self._used = _UsedBackends()

    @property
    def used_backends(self) -> set[str]:
        """Names of the backends that have run so far."""
        return set(vars(self._used))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """``[B, S, H, D], [B, K, G, D], [B, K, G, D] -> [B, S, H, D]``."""
        attn_mask = None if attn_metadata is None else attn_metadata.attn_mask
        backend = select_backend(self._requested, query, key, self.causal, attn_mask)
        setattr(self._used, backend.name, True)
        return backend.forward(
            query, key, value, softmax_scale=self.softmax_scale, causal=self.causal, attn_mask=attn_mask
        )
