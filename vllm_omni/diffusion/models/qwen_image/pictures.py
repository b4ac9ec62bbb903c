"""What the pipelines of Qwen-Image that start from pictures share (arXiv:2508.02324).

A picture enters twice: as the vision-language encoder sees it, and as clean latents beside the noisy ones.

Shapes: L tokens of text and pictures, J width of the text encoder, M tokens of given pictures, C latent channels of a
packed token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache, pictures_key
from vllm_omni.diffusion.encoders.vae import encode_pixels, picture_pixels
from vllm_omni.diffusion.encoders.vision_language import PicturePrompts, check_no_reserved_tokens
from vllm_omni.diffusion.latents import check_given_latents, pack_latents
from vllm_omni.diffusion.models.qwen_image import common
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import ImageShape
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import log_resize

PROMPT_KEYS = common.PROMPT_KEYS | {"multi_modal_data"}
# Where a picture's features go in a prompt.
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"

_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects,"
    " background), then explain how the user's text instruction should alter or modify the image. Generate a new image"
    " that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n%s{}<|im_end|>\n<|im_start|>assistant\n"
)
# The system message and the user's header: the transformer was trained without their hidden states.
_NUM_TEMPLATE_TOKENS = 64
_SIDE_MULTIPLE = 32  # pixels, of a picture that is fitted to an area
# Longer than that, and rounding would leave nothing of the shorter side, or more than the vision tower takes.
_MAX_ASPECT_RATIO = 100


def edit_request_spec(od_config: OmniDiffusionConfig) -> RequestSpec:
    """Defaults of diffusers' editing pipelines. The pre-process function sets an absent height and width."""
    return RequestSpec(
        defaults={"height": None, "width": None, **common.request_defaults(od_config)},
        tasks=("image-edit",),
        size_multiple=common.vae_scale_factor(od_config) * common.PATCH_SIZE,
        prompt_keys=PROMPT_KEYS,
        check=functools.partial(_check_edit_request, od_config),
    )


def _check_edit_request(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    params = request.sampling_params
    common.check_texts(od_config, request)
    for name in ("prompt", "negative_prompt"):
        check_no_reserved_tokens(str(request.prompt.get(name, "")), name)
    rows, columns = common.token_grid(params.height, params.width, common.vae_scale_factor(od_config))
    check_given_latents(request, (rows * columns, od_config.tf_model_config["in_channels"]))


def side_multiple(od_config: OmniDiffusionConfig) -> int:
    """What divides the sides [px] of a picture that becomes latents: 32, or more for a deeper autoencoder."""
    return math.lcm(_SIDE_MULTIPLE, common.vae_scale_factor(od_config) * common.PATCH_SIZE)


def fit_to_area(picture: Image.Image, area: int, multiple: int = _SIDE_MULTIPLE) -> Image.Image:
    """A picture resized to about ``area`` pixels in its own aspect ratio, with sides that ``multiple`` divides.

    Raises ``InvalidRequestError`` with ``param="image"`` for a picture that is too narrow for that.
    """
    ratio = picture.width / picture.height
    if not 1 / _MAX_ASPECT_RATIO <= ratio <= _MAX_ASPECT_RATIO:
        raise InvalidRequestError(
            f"image is {picture.width} x {picture.height} pixels; one side may be at most {_MAX_ASPECT_RATIO} times as"
            " long as the other; crop it",
            param="image",
        )
    width = math.sqrt(area * ratio)
    size = tuple(max(1, round(side / multiple)) * multiple for side in (width, width / ratio))
    log_resize(picture, *size)
    return picture.resize(size, resample=Image.Resampling.LANCZOS)


def default_to_size_of(request: OmniDiffusionRequest, picture: Image.Image) -> None:
    """Fill in the height and the width that the request leaves open."""
    params = request.sampling_params
    params.height = picture.height if params.height is None else params.height
    params.width = picture.width if params.width is None else params.width


def picture_latents(
    vae: Any, pictures: Sequence[Image.Image], dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[ImageShape, ...]]:
    """Latents of given pictures, one after the other: tokens ``[1, M, C]`` in ``dtype``, and the pictures' shapes."""
    tokens, shapes = [], []
    for picture in pictures:
        latents = encode_pixels(vae, picture_pixels(picture))[:, :, 0]
        tokens.append(pack_latents(latents, common.PATCH_SIZE))
        shapes.append((1, latents.shape[2] // common.PATCH_SIZE, latents.shape[3] // common.PATCH_SIZE))
    return torch.cat(tokens, dim=1).to(dtype), tuple(shapes)


def edit_encoder(
    text_encoder: Any,
    tokenizer: Any,
    image_processor: Any,
    *,
    pictures: Sequence[Image.Image],
    introduction: str,
    max_length: int,
    cache: PromptEmbedCache,
) -> Callable[[str, str], torch.Tensor]:
    """A function from an editing text and the name of its field to its embedding ``[1, L, J]``.

    ``introduction`` is what a prompt says of the pictures, with one placeholder for each. The vision tower runs once,
    and not at all if the cache holds every text with these pictures.
    """
    shown = functools.cache(lambda: PicturePrompts(text_encoder, tokenizer, image_processor, pictures))
    key = pictures_key(pictures)

    def encode(text: str, param: str) -> torch.Tensor:
        common.require_processors(param, tokenizer, image_processor)
        return cache.get(
            (text, max_length, key),
            lambda: shown().encode(
                text,
                template=_TEMPLATE % introduction,
                num_dropped_tokens=_NUM_TEMPLATE_TOKENS,
                max_length=max_length,
                param=param,
            ),
        )

    return encode
