"""The picture of a request: read, sized and brought into the form that the encoders take, before any device work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPImageProcessorPil

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.encoders.vae import picture_pixels
from vllm_omni.diffusion.models.wan2_2.checkpoint import WanCheckpoint
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidModelFolderError, InvalidRequestError, nearest_name
from vllm_omni.inputs.images import load_images, log_resize

PICTURE_KEY = "multi_modal_data"

# Entries of request.extra: the picture at the size of the video, [1, 3, 1, height, width] in [-1, 1], and as the image
# encoder takes it, [1, 3, side, side].
PIXELS = "pixels"
IMAGE_ENCODER_PIXELS = "image_encoder_pixels"


def load_image_processor(od_config: OmniDiffusionConfig, checkpoint: WanCheckpoint) -> Any:
    """What prepares the picture for the image encoder, or None without one."""
    if not checkpoint.has_image_encoder:
        return None
    folder = Path(od_config.model) / "image_processor"
    try:
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidModelFolderError(f"{folder} holds no image processor that loads: {error}") from error


def prepare_picture(
    checkpoint: WanCheckpoint, image_processor: Any, request: OmniDiffusionRequest
) -> OmniDiffusionRequest:
    """Put a request's picture into ``request.extra``. Raises ``InvalidRequestError`` for what is no picture.

    A size that the request leaves open is that of the picture's proportions.
    """
    given: Any = request.prompt.get(PICTURE_KEY)
    if given is None:
        return request
    for name in given:
        if name != "image":
            raise InvalidRequestError(
                f"multi_modal_data holds {name!r}; {nearest_name(str(name), ['image'])}", param=str(name)
            )
    if given.get("image") is None:
        raise InvalidRequestError("multi_modal_data holds no image; give one as 'image'", param="image")
    picture = load_images(given["image"], param="image")[0]
    _resolve_size(request, picture, checkpoint)
    params = request.sampling_params
    log_resize(picture, params.width, params.height)
    request.extra[PIXELS] = picture_pixels(picture.resize((params.width, params.height), Image.Resampling.LANCZOS))
    if image_processor is not None:
        request.extra[IMAGE_ENCODER_PIXELS] = image_processor(picture, return_tensors="pt").pixel_values
    del request.prompt["multi_modal_data"]  # a job may wait for long, and the file be large
    return request


def _resolve_size(request: OmniDiffusionRequest, picture: Image.Image, checkpoint: WanCheckpoint) -> None:
    """Fill in height and width where they are open: the picture's proportions, in all about the usual area."""
    params, aspect = request.sampling_params, picture.height / picture.width
    multiple = checkpoint.size_multiple
    if params.height is None and params.width is None:
        area = checkpoint.usual_video["height"] * checkpoint.usual_video["width"]
        params.height = _rounded(math.sqrt(area * aspect), multiple)
        params.width = _rounded(math.sqrt(area / aspect), multiple)
    elif params.height is None:
        params.height = _rounded(params.width * aspect, multiple)
    elif params.width is None:
        params.width = _rounded(params.height / aspect, multiple)


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
