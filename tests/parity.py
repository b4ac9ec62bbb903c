"""How far our outputs may be from those of diffusers, and how that is measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

LATENT_TOLERANCE = 1e-4  # max abs, float32
BF16_TOLERANCE = 3e-2  # relative, root mean square


def assert_same_latents(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = LATENT_TOLERANCE) -> None:
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    difference = (ours - reference).abs().max().item()
    assert difference <= tolerance, f"latents differ by {difference:.2e}, more than {tolerance:.0e}"
    assert reference.std() > 0.05, "a constant output proves nothing"


def assert_same_pictures(ours: Sequence[Image.Image], reference: Sequence[Image.Image]) -> None:
    """Pixels within 1/255."""
    assert len(ours) == len(reference)
    for mine, other in zip(ours, reference, strict=True):
        assert mine.size == other.size
        assert mine.mode == other.mode
        difference = np.abs(np.asarray(mine, np.int16) - np.asarray(other, np.int16)).max()
        assert difference <= 1, f"pixels differ by {difference}/255"
        assert np.asarray(other).std() > 1, "a constant picture proves nothing"


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.float() - reference.float()).norm() / reference.float().norm()).item()


def generators(*seeds: int) -> list[torch.Generator]:
    """What a diffusers pipeline takes to draw one noise per output."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
