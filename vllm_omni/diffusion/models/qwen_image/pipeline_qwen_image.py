"""Qwen-Image text to image (arXiv:2508.02324), from the folder layout of diffusers.

Shapes: N outputs, L text tokens, J width of the text encoder, I image tokens, C latent channels of a packed token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache
from vllm_omni.diffusion.encoders.text import encode_templated_prompt
from vllm_omni.diffusion.latents import check_given_latents
from vllm_omni.diffusion.model_loader.components import load_text_encoder, load_tokenizer
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.qwen_image import common
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import euler_config, request_sigmas, resolution_shift


def get_qwen_image_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class QwenImagePipeline(nn.Module):
    """Text to image with true classifier-free guidance."""

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
        # Vision tower and language head take no part in text to image, so they are not kept.
        self.text_encoder = load_text_encoder(Qwen2_5_VLForConditionalGeneration, od_config).model.language_model
        self.vae = common.load_vae(od_config)
        self.transformer = common.load_transformer(od_config)
        self.weights_sources = common.transformer_weights(od_config)
        self.prompt_embed_cache = PromptEmbedCache.from_config(od_config)

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Defaults of diffusers' pipeline."""
        scale_factor = common.vae_scale_factor(od_config)
        side = 128 * scale_factor
        return RequestSpec(
            defaults={"height": side, "width": side, **common.request_defaults(od_config)},
            tasks=("text-to-image",),
            size_multiple=scale_factor * common.PATCH_SIZE,
            prompt_keys=common.PROMPT_KEYS,
            check=functools.partial(_check_request, od_config),
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode the prompts, draw the noise and lay out the noise levels."""
        params = request.sampling_params
        rows, columns = common.token_grid(params.height, params.width, self.vae_scale_factor)
        frame = (self.vae.config.z_dim, rows * common.PATCH_SIZE, columns * common.PATCH_SIZE)
        mu = resolution_shift(rows * columns, self.scheduler_config)
        return common.denoise_state(
            request,
            embeds=common.text_branches(request, functools.partial(self._encode, request), self.dtype, self.device),
            latents=common.initial_latents(request, frame, 1, self.dtype, self.device),
            sigmas=request_sigmas(request, mu, self.scheduler_config).to(self.device),
            conditions={"img_shapes": ((1, rows, columns),)},
        )

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

    def _encode(self, request: OmniDiffusionRequest, text: str, param: str) -> torch.Tensor:
        """Hidden states of one text of the request, ``[1, L, J]``."""
        common.require_processors(param, self.tokenizer)
        max_length = request.sampling_params.max_sequence_length
        return self.prompt_embed_cache.get(
            (text, max_length),
            lambda: encode_templated_prompt(
                self.text_encoder,
                self.tokenizer,
                text,
                template=common.TEXT_TEMPLATE,
                num_dropped_tokens=common.NUM_TEXT_TEMPLATE_TOKENS,
                max_length=max_length,
                param=param,
            ),
        )


def _check_request(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    """What can be known before any tensor is computed. Raises ``InvalidRequestError``."""
    params = request.sampling_params
    common.check_texts(od_config, request)
    common.check_embeds_length(request)
    rows, columns = common.token_grid(params.height, params.width, common.vae_scale_factor(od_config))
    check_given_latents(request, (rows * columns, od_config.tf_model_config["in_channels"]))
