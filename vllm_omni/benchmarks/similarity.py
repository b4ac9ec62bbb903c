"""How near two pictures are: PSNR, SSIM, and LPIPS where that package is installed.

Shapes: C channels, H and W in pixels. Pictures are compared in 8 bits, as they are stored.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# The window of the SSIM paper: a Gaussian of 11 x 11 pixels, and constants for a range of 255.
_WINDOW_SIDE = 11
_WINDOW_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal pictures."""
    difference = _as_tensor(first) - _as_tensor(second)
    error = float(difference.square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(first: Image.Image, second: Image.Image) -> float:
    """Structural similarity (Wang et al., 2004), at most 1: the mean over channels and all whole windows.

    The window is a Gaussian of 11 x 11 pixels with sigma 1.5, or of the shorter side where that is less.
    """
    x, y = _as_tensor(first), _as_tensor(second)
    side = min(_WINDOW_SIDE, *x.shape[1:])
    window = _gaussian_window(side)

    def blurred(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values[:, None], window)[:, 0]

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x**2
    variance_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * structure).mean())


def lpips_distance() -> tuple[Callable[[Image.Image, Image.Image], float] | None, str]:
    """A function that gives the LPIPS distance (arXiv:1801.03924, AlexNet), or None; and why, in words.

    The package ``lpips`` brings its weights along except for AlexNet's, which it takes from torchvision.
    """
    if importlib.util.find_spec("lpips") is None:
        return None, "not measured: the package lpips is not installed"
    try:
        network = _lpips_network()
    except Exception as error:
        return None, f"not measured: lpips does not load ({type(error).__name__}: {error})"

    @torch.inference_mode()
    def distance(first: Image.Image, second: Image.Image) -> float:
        pair = [_as_tensor(picture.convert("RGB"))[None].float() / 127.5 - 1 for picture in (first, second)]
        return float(network(*pair))

    return distance, "AlexNet"


@cache
def _lpips_network() -> Any:
    import lpips  # type: ignore[import-not-found,unused-ignore]  # an optional package

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _as_tensor(picture: Image.Image) -> torch.Tensor:
    """``[C, H, W]`` in float64, from 0 to 255."""
    values = torch.from_numpy(np.array(picture, np.float64))
    return values[None] if values.dim() == 2 else values.movedim(-1, 0)


def _gaussian_window(side: int) -> torch.Tensor:
    """``[1, 1, side, side]``, with sum 1."""
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * _WINDOW_SIGMA**2))
    window = torch.outer(weights, weights)
    return (window / window.sum())[None, None]
