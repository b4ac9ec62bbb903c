"""Qwen-Image-Edit: one picture, changed as a text says (arXiv:2508.02324), from the folder layout of diffusers.

Pre-processing leaves in ``request.extra`` the pictures as the text encoder sees them, ``encoder_pictures``, and as the
transformer does, ``latents_pictures``.

Shapes: N outputs, L tokens of text and pictures, J width of the text encoder, I noisy image tokens, C latent channels
of a packed token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache
from vllm_omni.diffusion.model_loader.components import (
    load_image_processor,
    load_text_encoder,
    load_tokenizer,
)
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.qwen_image import common, pictures
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import euler_config, request_sigmas, resolution_shift
from vllm_omni.inputs.images import prompt_images

_PICTURE_AREA = 1024 * 1024  # pixels, as the encoder and the transformer see the picture


def get_qwen_image_edit_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that brings the picture of a request to the size that the model works at."""
    return functools.partial(_pre_process, pictures.side_multiple(od_config))


def get_qwen_image_edit_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class QwenImageEditPipeline(nn.Module):
    """Picture and text to picture, with true classifier-free guidance."""

    sequence_conditions: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "encoder_hidden_states_mask"}
    caches_prompt_embeds: ClassVar[bool] = True

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.dtype = od_config.torch_dtype
        self.scheduler_config = euler_config(od_config)
        self.vae_scale_factor = common.vae_scale_factor(od_config)
        self.tokenizer = load_tokenizer(Qwen2Tokenizer, od_config)
        self.image_processor = load_image_processor(Qwen2VLImageProcessorPil, od_config)
        # The language head takes no part in editing, so it is not kept.
        self.text_encoder = load_text_encoder(Qwen2_5_VLForConditionalGeneration, od_config).model
        self.vae = common.load_vae(od_config)
        self.transformer = common.load_transformer(od_config)
        self.weights_sources = common.transformer_weights(od_config)
        self.prompt_embed_cache = PromptEmbedCache.from_config(od_config)

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Defaults of diffusers' pipeline."""
        return pictures.edit_request_spec(od_config)

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode the prompts and the pictures, draw the noise and lay out the noise levels."""
        params = request.sampling_params
        rows, columns = common.token_grid(params.height, params.width, self.vae_scale_factor)
        frame = (self.vae.config.z_dim, rows * common.PATCH_SIZE, columns * common.PATCH_SIZE)
        mu = resolution_shift(rows * columns, self.scheduler_config)
        shown = request.extra["encoder_pictures"]
        encode = pictures.edit_encoder(
            self.text_encoder,
            self.tokenizer,
            self.image_processor,
            pictures=shown,
            introduction=self.introduction(len(shown)),
            max_length=params.max_sequence_length,
            cache=self.prompt_embed_cache,
        )
        image_latents, shapes = pictures.picture_latents(self.vae, request.extra["latents_pictures"], self.dtype)
        return common.denoise_state(
            request,
            embeds=common.text_branches(request, encode, self.dtype, self.device),
            latents=common.initial_latents(request, frame, 1, self.dtype, self.device),
            sigmas=request_sigmas(request, mu, self.scheduler_config).to(self.device),
            conditions={"img_shapes": ((1, rows, columns), *shapes), "image_latents": image_latents},
        )

    def introduction(self, num_pictures: int) -> str:
        """What stands before the text of a prompt, with a placeholder for each picture."""
        return pictures.PLACEHOLDER * num_pictures

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, I, C], timestep [B] in [0, 1000] -> velocity [B, I, C]``."""
        return common.predict_velocity(self.transformer, latents, timestep, conditions, self.dtype)

    def decode(self, state: DenoiseState) -> torch.Tensor:
        """``-> pixels [N, 3, height, width] in [-1, 1]``."""
        return common.decode_picture(self.vae, state, self.vae_scale_factor)

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return denoise(self, req)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


def _pre_process(multiple: int, request: OmniDiffusionRequest) -> OmniDiffusionRequest:
    (picture,) = prompt_images(request.prompt)
    resized = pictures.fit_to_area(picture, _PICTURE_AREA, multiple)
    pictures.default_to_size_of(request, resized)
    request.extra["encoder_pictures"] = request.extra["latents_pictures"] = [resized]
    del request.prompt["multi_modal_data"]  # what is kept of it is smaller
    return request
