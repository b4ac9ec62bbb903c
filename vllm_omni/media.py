"""Files of pictures and videos.

Shapes: F frames, H and W in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from PIL import Image


def write_video(frames: Any, path: str | Path | BinaryIO, fps: float) -> None:
    """Write one video as H.264 in mp4, at ``fps`` frames per second, to a file or a file object.

    ``frames`` is what a request gives: a list of PIL pictures, an array ``[F, H, W, 3]`` or a tensor ``[F, 3, H, W]``,
    both in [0, 1]. Its chroma has half the resolution (yuv420p, which every player takes), so that a last odd row or
    column is doubled.
    """
    pictures = _as_uint8(frames)
    height, width = (side + side % 2 for side in pictures[0].shape[:2])
    target = str(path) if isinstance(path, Path) else path
    with av.open(target, "w", format="mp4") as container:
        # 1001 as the largest denominator keeps 24000/1001 and its kin exact.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for picture in pictures:
            rows, columns = picture.shape[:2]
            even = np.pad(picture, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def _as_uint8(frames: Any) -> Sequence[np.ndarray]:
    """``[H, W, 3]`` each, in uint8. Raises ``ValueError`` for what is no video."""
    if isinstance(frames, torch.Tensor):
        frames = frames.movedim(1, -1).float().cpu().numpy() if frames.dim() == 4 else frames
    if isinstance(frames, Iterable):
        pictures = [_frame_as_uint8(frame) for frame in frames]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) == 1 and all(len(shape) == 3 and shape[2] == 3 for shape in shapes):
            return pictures
    raise ValueError(
        f"frames is {_described(frames)}; it must hold at least one RGB frame, all of one size: PIL pictures,"
        " an array [F, H, W, 3] or a tensor [F, 3, H, W]"
    )


def _frame_as_uint8(frame: Any) -> np.ndarray:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    values = np.asarray(frame)
    return values if values.dtype == np.uint8 else (values * 255).clip(0, 255).round().astype(np.uint8)


def _described(frames: Any) -> str:
    shape = getattr(frames, "shape", None)
    return type(frames).__name__ + (f" of shape {list(shape)}" if shape is not None else "")


def opaque(picture: Image.Image) -> Image.Image:
    """Without transparency: laid on white."""
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
