"""Qwen-Image-Edit-2509 and -2511: one to several pictures, combined as a text says (arXiv:2508.02324).

The encoder sees small pictures, the transformer large ones.

Shapes: N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.qwen_image import pictures
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_edit import QwenImageEditPipeline
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.images import prompt_images

_ENCODER_AREA = 384 * 384  # pixels
_LATENTS_AREA = 1024 * 1024  # pixels
# The models are meant for up to three; diffusers sets no limit, and each costs as many tokens as the output.
_MAX_PICTURES = 8


def get_qwen_image_edit_plus_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that brings the pictures of a request to the sizes that the model works at."""
    return functools.partial(_pre_process, pictures.side_multiple(od_config))


def get_qwen_image_edit_plus_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Pictures and text to picture, with true classifier-free guidance."""

    def introduction(self, num_pictures: int) -> str:
        """A numbered placeholder for each picture."""
        return "".join(f"Picture {number}: {pictures.PLACEHOLDER}" for number in range(1, num_pictures + 1))


def _pre_process(multiple: int, request: OmniDiffusionRequest) -> OmniDiffusionRequest:
    given = prompt_images(request.prompt, max_images=_MAX_PICTURES)
    request.extra["encoder_pictures"] = [pictures.fit_to_area(picture, _ENCODER_AREA) for picture in given]
    request.extra["latents_pictures"] = [pictures.fit_to_area(picture, _LATENTS_AREA, multiple) for picture in given]
    pictures.default_to_size_of(request, request.extra["latents_pictures"][-1])
    del request.prompt["multi_modal_data"]  # what is kept of it is smaller
    return request
