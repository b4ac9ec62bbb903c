"""Pictures that come with a prompt: PIL, numpy, encoded bytes or a data URL, brought to one form or refused.

A string that is no data URL is refused: nothing in a prompt is ever opened as a file or fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniPrompt
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

# Of all pictures of a request. More are refused before they are decoded: a few kilobytes can unpack to gigabytes.
MAX_PIXELS = 64 * 1024 * 1024
# Pillow knows many more, of which one runs a program (EPS), and few of whose decoders have many eyes on them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# How Pillow names samples of 16 bits; without the letter of their byte order, three channels share the 16 bits.
_SIXTEEN_BITS = re.compile(";16[BLN]")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


def prompt_images(prompt: OmniPrompt, *, mode: str = "RGB", max_images: int = 1) -> list[Image.Image]:
    """The pictures of a prompt for a model that needs them, from ``multi_modal_data={"image": ...}``.

    Raises ``InvalidRequestError`` with ``param="image"``, also if there is none.
    """
    media = prompt.get("multi_modal_data", {})
    for kind in media:
        if kind != "image":
            raise InvalidRequestError(
                f"multi_modal_data holds {kind!r}; this model takes only 'image'", param="multi_modal_data"
            )
    value = media.get("image")
    if value is None:
        raise InvalidRequestError(
            "this model works on a picture; give it as {'prompt': ..., 'multi_modal_data': {'image': picture}}",
            param="image",
        )
    return load_images(value, param="image", mode=mode, max_images=max_images)


def load_images(value: Any, *, param: str, mode: str = "RGB", max_images: int = 1) -> list[Image.Image]:
    """One picture or a list of them as PIL pictures in ``mode`` (``"RGB"`` or ``"RGBA"``).

    Greyscale, palette and CMYK pictures are converted. Transparency is laid on white where ``mode`` has none. An
    animated picture, or one of more than 8 bits per channel, is refused, since a part of it would be lost.
    Raises ``InvalidRequestError`` that names ``param``.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not 1 <= len(values) <= max_images:
        allowed = "one picture" if max_images == 1 else f"1 to {max_images} pictures"
        raise InvalidRequestError(f"{param} holds {len(values)} pictures; this model takes {allowed}", param=param)
    pictures: list[Image.Image] = []
    for item in values:
        num_left = MAX_PIXELS - sum(picture.width * picture.height for picture in pictures)
        pictures.append(_in_mode(_load(item, param, num_left), mode, param))
    return pictures


def log_resize(picture: Image.Image, width: int, height: int) -> None:
    """Say in the log that a model does not take a picture at its own size."""
    if picture.size != (width, height):
        logger.info("a picture of %d x %d pixels is brought to %d x %d", picture.width, picture.height, width, height)


def _load(value: Any, param: str, max_pixels: int) -> Image.Image:
    if isinstance(value, Image.Image):
        picture = _checked(value, param, max_pixels)
    elif isinstance(value, np.ndarray):
        picture = _from_array(value, param)
    elif isinstance(value, (bytes, bytearray)):
        picture = _decode(bytes(value), param, max_pixels)
    elif isinstance(value, str):
        picture = _decode(_data_url_bytes(value, param), param, max_pixels)
    else:
        raise InvalidRequestError(
            f"{param} is a {type(value).__name__}; give a PIL picture, a numpy array, encoded bytes or a data URL",
            param=param,
        )
    _check_size(picture, param, max_pixels)
    return picture


def _data_url_bytes(value: str, param: str) -> bytes:
    header = _DATA_URL.match(value)
    if header is None:
        raise InvalidRequestError(
            f"{param} is the string {value[:40]!r}, which is no data URL (data:image/png;base64,...); files and web"
            " addresses in a prompt are never opened",
            param=param,
        )
    try:
        return base64.b64decode(value[header.end() :], validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"{param} is a data URL with broken base64 ({error})", param=param) from error


def _decode(encoded: bytes, param: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Between what Pillow warns of and what it refuses; both are more than _check_size lets through.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        picture = _checked(picture, param, max_pixels)
        # As a viewer shows it: cameras store how they were held beside the pixels.
        return ImageOps.exif_transpose(picture)
    except InvalidRequestError:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidRequestError(
            f"{param} unpacks to a larger picture than the {MAX_PIXELS:,} pixels that are taken; scale it down",
            param=param,
        ) from error
    except UnidentifiedImageError as error:  # its own text names a buffer of ours
        raise InvalidRequestError(
            f"{param} holds {len(encoded)} bytes that are no picture; give the bytes of a PNG, JPEG or WebP file",
            param=param,
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequestError(
            f"{param} holds {len(encoded)} bytes that are no picture ({error}); give those of a whole file", param=param
        ) from error


def _checked(picture: Image.Image, param: str, max_pixels: int) -> Image.Image:
    """A picture whose pixels are loaded, after the checks that must come before that."""
    _check_size(picture, param, max_pixels)
    num_frames = getattr(picture, "n_frames", 1)  # only formats that can be animated have it
    if num_frames > 1:
        raise InvalidRequestError(f"{param} is animated, with {num_frames} frames; give one of them", param=param)
    # Pillow drops the lower bits of 16-bit colours as it decodes; what a file holds is known only before that.
    if any(_SIXTEEN_BITS.search(str(tile[3])) for tile in getattr(picture, "tile", ())):
        raise InvalidRequestError(f"{param} has 16 bits per channel; convert it to 8 bits", param=param)
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequestError(
            f"{param} cannot be decoded ({error}); give all bytes of the file", param=param
        ) from error
    return picture


def _from_array(values: np.ndarray, param: str) -> Image.Image:
    """``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``: uint8, or floats in [0, 1]."""
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise InvalidRequestError(
            f"{param} is an array of shape {list(values.shape)}; it must be [H, W], [H, W, 3] or [H, W, 4]", param=param
        )
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InvalidRequestError(f"{param} is an array of floats outside [0, 1]", param=param)
        values = np.round(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise InvalidRequestError(f"{param} is an array of {values.dtype}; it must be uint8 or floats", param=param)
    return Image.fromarray(values)


def _check_size(picture: Image.Image, param: str, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        beside = "" if max_pixels == MAX_PIXELS else " beside those that came before it"
        raise InvalidRequestError(
            f"{param} is {picture.width} x {picture.height} pixels{beside}; at most {MAX_PIXELS:,} are taken in all, so"
            " scale it down",
            param=param,
        )


def _in_mode(picture: Image.Image, mode: str, param: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise InvalidRequestError(
            f"{param} has more than 8 bits per channel (mode {picture.mode}); convert it to 8 bits", param=param
        )
    if picture.mode == mode:
        return picture
    if mode == "RGB" and picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return picture.convert(mode)
