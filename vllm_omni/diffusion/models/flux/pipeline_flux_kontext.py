"""FLUX.1 Kontext: a picture and an instruction to a picture (arXiv:2506.15742).

The reference picture is encoded once per request. Its tokens follow the latents in every forward, with 1 as the first
axis of their positions, and what the transformer predicts for them is dropped.

Shapes: N outputs, I image tokens, R tokens of the reference picture, C latent channels of a packed token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState
from vllm_omni.diffusion.encoders.vae import encode_scaled_latents
from vllm_omni.diffusion.latents import pack_latents
from vllm_omni.diffusion.models.flux.pipeline_flux import PATCH_SIZE, FluxPipeline, token_side
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import log_resize, prompt_images

# (width, height) in pixels of the pictures that the model was trained on
_TRAINED_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)


def get_flux_kontext_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that puts the reference picture into ``request.extra["image"]``: pixels ``[1, 3, H, W]`` in [-1, 1].

    The picture takes the nearest of the trained sizes by aspect ratio. With ``extra_args={"auto_resize": False}`` it
    keeps its own, rounded down to whole tokens. Raises ``InvalidRequestError`` for a picture that cannot be taken.
    """
    side = token_side(od_config)
    processor = VaeImageProcessor(vae_scale_factor=side)

    def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        auto_resize = request.sampling_params.extra_args["auto_resize"]
        if not isinstance(auto_resize, bool):
            raise InvalidRequestError(
                f"auto_resize={auto_resize!r} must be True or False", param="extra_args.auto_resize"
            )
        (picture,) = prompt_images(request.prompt)
        width, height = (length // side * side for length in picture.size)
        if not (width and height):
            raise InvalidRequestError(
                f"image is {picture.width} x {picture.height} pixels; it must be at least {side} x {side}",
                param="image",
            )
        if auto_resize:
            width, height = _nearest_trained_size(width / height, side)
        log_resize(picture, width, height)
        request.extra["image"] = processor.preprocess(picture, height, width)
        del request.prompt["multi_modal_data"]  # the file may be large
        return request

    return pre_process


def get_flux_kontext_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class FluxKontextPipeline(FluxPipeline):
    """Picture and text to picture."""

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        spec = super().request_spec(od_config)
        return dataclasses.replace(
            spec,
            tasks=("image-edit",),
            prompt_keys=spec.prompt_keys | {"multi_modal_data"},
            extra_args={"auto_resize": True},
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """What text to image prepares, and the latents of the reference picture for every branch."""
        state = super().prepare(request)
        pixels = request.extra["image"]
        latents = pack_latents(encode_scaled_latents(self.vae, pixels), PATCH_SIZE)
        rows, columns = (length // self.token_side for length in pixels.shape[-2:])
        state.branches = tuple(
            {
                **branch,
                "image_latents": latents.to(self.dtype),
                "img_shapes": (*branch["img_shapes"], (1, rows, columns)),
            }
            for branch in state.branches
        )
        return state

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, I, C], timestep [B] in [0, 1000], image_latents [B, R, C] -> velocity [B, I, C]``."""
        others = dict(conditions)
        tokens = torch.cat([latents.to(self.dtype), others.pop("image_latents")], dim=1)
        return super().predict(tokens, timestep, others)[:, : latents.shape[1]]


def _nearest_trained_size(aspect_ratio: float, side: int) -> tuple[int, int]:
    """Width and height in pixels, in whole tokens of ``side`` pixels."""
    width, height = min(_TRAINED_SIZES, key=lambda size: (abs(aspect_ratio - size[0] / size[1]), size))
    return width // side * side, height // side * side
