"""Guidance: how the predictions of a request's branches become one.

Shapes: B batch, ``...`` the latent dimensions of the model, D its last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# (predictions of the branches [B, ...] each, the positive one first; scale [B, 1, ...]) -> [B, ...]
CombineRule = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Guidance:
    """The scale of each step, ``[T]`` in float32, and the rule that combine the branches of a request."""

    scale: torch.Tensor
    combine: CombineRule


def classifier_free(predictions: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598): ``negative + scale * (positive - negative)``."""
    positive, negative = predictions
    return torch.addcmul(negative, scale, positive - negative)


def classifier_free_norm_preserving(predictions: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance, rescaled so that each token keeps the norm of the positive prediction.

    The rule of Qwen-Image (arXiv:2508.02324): a large scale changes the direction and does not burn the picture.
    """
    positive, _ = predictions
    combined = classifier_free(predictions, scale)
    norm = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return combined * (norm / torch.linalg.vector_norm(combined, dim=-1, keepdim=True))
