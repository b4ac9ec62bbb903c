"""Wan 2.1 and 2.2 image to video (arXiv:2503.20314): the picture becomes the first frame.

Wan 2.2 A14B is given the encoded picture as further input channels, Wan 2.1 its CLIP features as well. Wan 2.2 TI2V-5B
keeps it as the first latent frame.

Shapes: C latent channels, F H W latent frames, height and width, I tokens of the picture, K its features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionModel

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.encoders.vae import encode_pixels
from vllm_omni.diffusion.model_loader.components import load_text_encoder
from vllm_omni.diffusion.models.wan2_2.checkpoint import WanCheckpoint
from vllm_omni.diffusion.models.wan2_2.picture import (
    IMAGE_ENCODER_PIXELS,
    PICTURE_KEY,
    PIXELS,
    load_image_processor,
    prepare_picture,
)
from vllm_omni.diffusion.models.wan2_2.pipeline_wan2_2 import WanPipeline
from vllm_omni.diffusion.postprocess import videos_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidModelFolderError, InvalidRequestError


def get_wan_i2v_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that prepares the picture, without which there is no request."""
    checkpoint = WanCheckpoint.read(od_config)
    image_processor = load_image_processor(od_config, checkpoint)

    def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        if PICTURE_KEY not in request.prompt:
            raise InvalidRequestError(
                "image to video needs a picture; give {'prompt': ..., 'multi_modal_data': {'image': ...}}",
                param="image",
            )
        return prepare_picture(checkpoint, image_processor, request)

    return pre_process


def get_wan_i2v_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, frames, height, width]`` in [-1, 1] to videos."""
    return videos_from_pixels


class WanImageToVideoPipeline(WanPipeline):
    """Image and text to video with classifier-free guidance."""

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        num_inputs = od_config.tf_model_config.get("in_channels", 16)
        expected = self._num_input_channels()
        if num_inputs != expected:
            raise InvalidModelFolderError(
                f"transformer/config.json: in_channels={num_inputs} must be {expected} for image to video: noise,"
                " picture and mask"
            )
        self.image_encoder = None
        if self.checkpoint.has_image_encoder:
            self.image_encoder = load_text_encoder(CLIPVisionModel, od_config, "image_encoder")

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        spec = super().request_spec(od_config)
        return dataclasses.replace(spec, tasks=("image-to-video",), prompt_keys=spec.prompt_keys | {PICTURE_KEY})

    def picture_conditions(self, request: OmniDiffusionRequest, latents: torch.Tensor) -> dict[str, Any]:
        """Features of the picture for attention, ``[1, I, K]``, and input channels ``[1, M + C, F, H, W]``."""
        if self.checkpoint.expand_timesteps:
            return super().picture_conditions(request, latents)
        conditions: dict[str, Any] = {"channels": self._picture_channels(request)}
        if self.image_encoder is not None:
            pixels = request.extra[IMAGE_ENCODER_PIXELS].to(self.device, self.dtype)
            # The last layer is trained for the contrast with texts; the one before keeps more of the picture.
            encoded = self.image_encoder(pixels, output_hidden_states=True)
            conditions["encoder_hidden_states_image"] = encoded.hidden_states[-2]
        return conditions

    def _picture_channels(self, request: OmniDiffusionRequest) -> torch.Tensor:
        """Mask and latents of a video that is the picture, then grey frames: ``[1, M + C, F, H, W]``.

        The mask's M channels are the frames of a latent frame; it is 1 where they are given.
        """
        picture = request.extra[PIXELS].to(self.device)
        following = (0, 0, 0, 0, 0, request.sampling_params.num_frames - 1)
        encoded = encode_pixels(self.vae, torch.nn.functional.pad(picture, following))
        mask = encoded.new_zeros(1, self.checkpoint.temporal_factor, *encoded.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, encoded], dim=1).to(self.dtype)

    def _num_input_channels(self) -> int:
        num_channels = self.checkpoint.num_channels
        if self.checkpoint.expand_timesteps:
            return num_channels
        return 2 * num_channels + self.checkpoint.temporal_factor
