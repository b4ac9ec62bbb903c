"""The attention layer that every model uses.

Shapes: B batch, S query tokens, K key tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.fp8 import BACKEND_NAME, ScaledHeads, attend
from vllm_omni.diffusion.attention.selector import requested_backend, select_backend
from vllm_omni.diffusion.attention.sequence_parallel import split_attention
from vllm_omni.diffusion.distributed.groups import current_groups
from vllm_omni.diffusion.distributed.sequence_parallel import current_sharded_forward
from vllm_omni.errors import FeatureNotAvailableError

__all__ = ["Attention", "AttentionMetadata"]


class _UsedBackends:
    """Has an attribute by the name of each backend that ran.

    It is written and never read in ``forward``: what a trace had read would be guarded, and a first use retraced.
    """


class Attention(nn.Module):
    """Scaled dot-product attention on whichever backend was chosen.

    ``num_heads`` and ``num_kv_heads`` count the heads of this rank. It holds no weights. Where ranks split the
    sequence, they attend to all of it together; with ``skip_sequence_parallel``, to keys that every rank has.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        skip_sequence_parallel: bool = False,
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
        groups = current_groups()
        if causal and groups.ring.size > 1:
            raise FeatureNotAvailableError(
                f"ring_degree={groups.ring.size}: a ring passes keys on without their order, so that it cannot"
                " mask causally; use ulysses_degree"
            )
        self._is_split = groups.sequence.size > 1 and not skip_sequence_parallel

    @property
    def used_backends(self) -> set[str]:
        """Names of the backends that have run so far."""
        return set(vars(self._used))

    def forward(
        self,
        query: torch.Tensor | ScaledHeads,
        key: torch.Tensor | ScaledHeads,
        value: torch.Tensor | ScaledHeads,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """``[B, S, H, D], [B, K, G, D], [B, K, G, D] -> [B, S, H, D]``. Heads in FP8 are attended in FP8."""
        attn_mask = None if attn_metadata is None else attn_metadata.attn_mask
        if isinstance(query, ScaledHeads) and isinstance(key, ScaledHeads) and isinstance(value, ScaledHeads):
            if attn_mask is None:
                setattr(self._used, BACKEND_NAME, True)
                return attend(query, key, value, self.softmax_scale, self.causal)
            # The kernel takes no mask.
            query, key, value = query.restored(), key.restored(), value.restored()
        assert isinstance(query, torch.Tensor)
        assert isinstance(key, torch.Tensor)
        assert isinstance(value, torch.Tensor)
        if self._is_split:
            # Lengths of other ranks and what is passed around are no business of a trace.
            run = _traced_split_attention if torch.compiler.is_compiling() else _split_or_whole
            return run(query, key, value, attn_mask, self.softmax_scale, self.causal, self._requested)
        backend = select_backend(self._requested, query, key, self.causal, attn_mask)
        setattr(self._used, backend.name, True)
        return backend.forward(
            query, key, value, softmax_scale=self.softmax_scale, causal=self.causal, attn_mask=attn_mask
        )


def _split_or_whole(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    requested: str | None,
) -> torch.Tensor:
    """Attention over the tokens of all ranks if the forward in progress has split a sequence, else over these."""
    forward = current_sharded_forward()
    if forward is None:
        backend = select_backend(requested, query, key, causal, attn_mask)
        return backend.forward(
            query, key, value, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask
        ).contiguous()
    return split_attention(
        forward,
        query,
        key,
        value,
        softmax_scale=softmax_scale,
        causal=causal,
        attn_mask=attn_mask,
        requested_backend=requested,
    ).contiguous()


_traced_split_attention = torch.library.custom_op("vllm_omni::split_attention", _split_or_whole, mutates_args=())


@_traced_split_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    requested: str | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)
