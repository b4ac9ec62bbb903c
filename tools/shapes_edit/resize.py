"""The resizing that the pipeline does to its picture, as matrices, so that training sees the same numbers on a GPU.

The pipeline resizes with Pillow's Lanczos filter: to 1024 x 1024 pixels for the autoencoder and to 384 x 384 for the
vision tower. Pillow filters first along rows and then along columns, and rounds to whole values each time.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.shapes import scenes

LATENTS_SIDE, VISION_SIDE = 1024, 384


@cache
def lanczos(side: int, device: torch.device) -> Tensor:
    """Matrix [side, 256] that resizes a column of a picture."""
    identity = Image.fromarray(np.eye(scenes.PICTURE_SIZE, dtype=np.float32))
    matrix = np.asarray(identity.resize((scenes.PICTURE_SIZE, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(matrix.copy()).to(device)


def resize(pictures: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, 256, 256] in -1..1 to [B, 3, side, side], as Pillow resizes them."""
    return _resized_values(pictures, side).float() / 127.5 - 1


def resize_and_shrink(pictures: Tensor, factor: int) -> Tensor:
    """Pictures resized to 1024 x 1024, of which each square of `factor` pixels becomes its mean."""
    return box(_resized_values(pictures, LATENTS_SIDE), factor).float() / 127.5 - 1


def box(pictures: Tensor, factor: int) -> Tensor:
    """Means of squares of `factor` pixels."""
    return torch.nn.functional.avg_pool2d(pictures, factor)


def _resized_values(pictures: Tensor, side: int) -> Tensor:
    """Whole values in 0..255. In half precision on a GPU: now and then one is the next."""
    dtype = torch.float16 if pictures.is_cuda else torch.float32
    matrix = lanczos(side, pictures.device).to(dtype)
    values = ((pictures + 1) * 127.5).round().to(dtype)
    return _round(matrix @ _round(values @ matrix.T))


def _round(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).add_(0.5).floor_()
