"""The interface of an attention backend.

Shapes: B batch, S query tokens, K key tokens, H query heads, G key/value heads (H is a multiple of G), D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """What goes with query, key and value.

    ``attn_mask``: True (or non-zero) where a key takes part. ``[B, K]`` masks keys; ``[B, 1, S, K]``, with any of
    the first three dimensions 1, masks pairs. A float mask of four dimensions is added to the scores.
    """

    attn_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """All that the choice of a backend depends on. It can be hashed, and holds no size but the head's."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    causal: bool
    has_mask: bool


class AttentionBackend(ABC):
    """One implementation of scaled dot-product attention. It has no state."""

    name: ClassVar[str]

    @abstractmethod
    def why_unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on ``device`` at all, or None if it can."""

    @abstractmethod
    def why_unsupported(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot run on these inputs, or None if it can."""

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[B, S, H, D], [B, K, G, D], [B, K, G, D] -> [B, S, H, D]``."""
