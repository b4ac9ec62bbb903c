"""From a pipeline's pixels to what the user asked for.

Shapes: N outputs, F frames, C colour channels (RGB or RGBA), H and W in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

# Of a video: in between they take several times the memory of the pixels.
_FRAMES_AT_ONCE = 16


def images_from_pixels(pixels: torch.Tensor, output_type: str = "pil") -> Any:
    """``pixels [N, C, H, W] in [-1, 1]`` as PIL pictures, or as values in [0, 1].

    ``"pil"``: a list of pictures; ``"np"``: float32 ``[N, H, W, C]``; ``"pt"``: float32 ``[N, C, H, W]``.
    """
    # Where the pixels are, in place and in the order of memory: six times as fast on a CPU as after the permutation.
    values = torch.mul(pixels.float(), 0.5).add_(0.5).clamp_(0, 1)
    if output_type == "pt":
        return values.cpu()
    if output_type == "np":
        return values.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "pil":
        integers = values.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(picture) for picture in integers.contiguous().numpy()]
    raise ValueError(f"output_type={output_type!r} must be one of pil, np, pt")


def videos_from_pixels(pixels: torch.Tensor, output_type: str = "pil") -> Any:
    """``pixels [N, C, F, H, W] in [-1, 1]`` as lists of PIL frames, or as values in [0, 1].

    ``"pil"``: a list of N lists of F pictures; ``"np"``: float32 ``[N, F, H, W, C]``; ``"pt"``: float32
    ``[N, F, C, H, W]``.
    """
    num_outputs, num_frames = pixels.shape[0], pixels.shape[2]
    parts = pixels.transpose(1, 2).flatten(0, 1).split(_FRAMES_AT_ONCE)
    converted = [images_from_pixels(part, output_type) for part in parts]
    if output_type == "pil":
        frames = [frame for part in converted for frame in part]
        return [frames[start : start + num_frames] for start in range(0, num_outputs * num_frames, num_frames)]
    joined = np.concatenate(converted) if output_type == "np" else torch.cat(converted)
    return joined.reshape(num_outputs, num_frames, *joined.shape[1:])
