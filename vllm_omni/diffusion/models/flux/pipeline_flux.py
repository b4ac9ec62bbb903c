"""FLUX.1 text to image (https://bfl.ai), from the folder layout of diffusers.

Shapes: N outputs, L text tokens, J width of T5, P width of CLIP's pooled vector, I image tokens, C latent channels of
a packed token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.clip import encode_pooled_prompt
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache
from vllm_omni.diffusion.encoders.t5 import encode_padded_prompt
from vllm_omni.diffusion.encoders.vae import decode_scaled_latents
from vllm_omni.diffusion.guidance import Guidance, classifier_free
from vllm_omni.diffusion.latents import (
    check_given_latents,
    initial_noise,
    pack_latents,
    unit_timestep,
    unpack_latents,
)
from vllm_omni.diffusion.model_loader.components import load_autoencoder, load_text_encoder, load_tokenizer
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler, euler_config, request_sigmas, resolution_shift
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.errors import InvalidRequestError

PATCH_SIZE = 2
_MAX_TEXT_TOKENS = 512


class _TextFields(NamedTuple):
    """Names of the request's fields that hold one text, or its embeddings instead."""

    text: str
    embeds: str
    pooled: str


_POSITIVE = _TextFields("prompt", "prompt_embeds", "pooled_prompt_embeds")
_NEGATIVE = _TextFields(*(f"negative_{name}" for name in _POSITIVE))


def get_flux_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class FluxPipeline(nn.Module):
    """Text to image. FLUX.1-dev takes its guidance scale as an input; both take classifier-free guidance as well."""

    # T5 pads every prompt to max_sequence_length, and the transformer attends to the padding: nothing is masked.
    sequence_conditions: ClassVar[Mapping[str, str]] = {}
    caches_prompt_embeds: ClassVar[bool] = True

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.dtype = od_config.torch_dtype
        self.scheduler_config = euler_config(od_config)
        self.token_side = token_side(od_config)
        self.tokenizer = load_tokenizer(CLIPTokenizer, od_config)
        self.tokenizer_2 = load_tokenizer(T5Tokenizer, od_config, "tokenizer_2")
        self.text_encoder = load_text_encoder(CLIPTextModel, od_config)
        self.text_encoder_2 = load_text_encoder(T5EncoderModel, od_config, "text_encoder_2")
        self.vae = load_autoencoder(AutoencoderKL, od_config)
        self.transformer = FluxTransformer2DModel(
            od_config=od_config,
            **get_transformer_config_kwargs(od_config.tf_model_config, FluxTransformer2DModel),
        )
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model, subfolder="transformer", prefix="transformer."
            )
        ]
        self.prompt_embed_cache = PromptEmbedCache.from_config(od_config)

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Defaults of diffusers' pipeline; of FLUX.1-schnell, which has no guidance input, its four steps."""
        side = 64 * token_side(od_config)
        defaults: dict[str, Any] = {
            "height": side,
            "width": side,
            "num_inference_steps": 4,
            "true_cfg_scale": 1.0,
            "max_sequence_length": _MAX_TEXT_TOKENS,
        }
        if od_config.tf_model_config.get("guidance_embeds"):
            defaults |= {"num_inference_steps": 28, "guidance_scale": 3.5}
        return RequestSpec(
            defaults=defaults,
            tasks=("text-to-image",),
            size_multiple=token_side(od_config),
            prompt_keys=frozenset({*_POSITIVE, *_NEGATIVE}),
            check=functools.partial(_check_request, od_config),
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode the prompts, draw the noise and lay out the noise levels."""
        params = request.sampling_params
        rows, columns = params.height // self.token_side, params.width // self.token_side
        texts = (_POSITIVE, _NEGATIVE) if params.true_cfg_scale > 1 else (_POSITIVE,)
        shared: dict[str, Any] = {"img_shapes": ((0, rows, columns),)}
        if params.guidance_scale is not None:
            shared["guidance"] = torch.full((1,), params.guidance_scale, device=self.device)
        branches = tuple(self._encode(request, fields) | shared for fields in texts)
        mu = resolution_shift(rows * columns, self.scheduler_config)
        sigmas = request_sigmas(request, mu, self.scheduler_config).to(self.device)
        guidance = None
        if len(branches) > 1:
            scale = sigmas.new_full((sigmas.shape[0] - 1,), params.true_cfg_scale)
            guidance = Guidance(scale=scale, combine=classifier_free)
        return DenoiseState(
            request_id=request.request_id,
            latents=self._initial_latents(request, rows, columns).float(),
            sigmas=sigmas,
            timesteps=sigmas[:-1] * 1000,
            branches=branches,
            sampler=FlowMatchEuler(),
            guidance=guidance,
            height=params.height,
            width=params.width,
        )

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, I, C], timestep [B] in [0, 1000] -> velocity [B, I, C]``."""
        prediction: torch.Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=unit_timestep(timestep, self.dtype),
            **conditions,
        )
        return prediction

    def decode(self, state: DenoiseState) -> torch.Tensor:
        """``-> pixels [N, 3, height, width] in [-1, 1]``."""
        rows, columns = state.height // self.token_side, state.width // self.token_side
        return decode_scaled_latents(self.vae, unpack_latents(state.latents, rows, columns, PATCH_SIZE))

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return denoise(self, req)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def _encode(self, request: OmniDiffusionRequest, fields: _TextFields) -> dict[str, torch.Tensor]:
        """Conditions of one text: T5's hidden states ``[1, L, J]`` and CLIP's pooled vector ``[1, P]``."""
        embeds: Any = request.prompt.get(fields.embeds)
        pooled: Any = request.prompt.get(fields.pooled)
        if embeds is None:
            if self.tokenizer is None or self.tokenizer_2 is None:
                raise InvalidRequestError(
                    f"the model has no tokenizers; give {fields.embeds} and {fields.pooled} instead of {fields.text}",
                    param=fields.text,
                )
            text = str(request.prompt.get(fields.text))
            max_length = request.sampling_params.max_sequence_length
            cache = self.prompt_embed_cache
            embeds = cache.get(
                ("embeds", text, max_length),
                lambda: encode_padded_prompt(
                    self.text_encoder_2, self.tokenizer_2, text, max_length=max_length, param=fields.text
                ),
            )
            pooled = cache.get(("pooled", text), lambda: encode_pooled_prompt(self.text_encoder, self.tokenizer, text))
        return {
            "encoder_hidden_states": embeds.to(self.device, self.dtype).view(1, -1, embeds.shape[-1]),
            "pooled_projections": pooled.to(self.device, self.dtype).view(1, -1),
        }

    def _initial_latents(self, request: OmniDiffusionRequest, rows: int, columns: int) -> torch.Tensor:
        given = request.sampling_params.latents
        if given is not None:
            return given.to(self.device)
        shape = (self.vae.config.latent_channels, rows * PATCH_SIZE, columns * PATCH_SIZE)
        return pack_latents(initial_noise(request, shape, self.dtype, self.device), PATCH_SIZE)


def token_side(od_config: OmniDiffusionConfig) -> int:
    """Pixels per image token and side."""
    return int(PATCH_SIZE * 2 ** (len(od_config.component_config("vae")["block_out_channels"]) - 1))


def _check_request(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    """What can be known before any tensor is computed. Raises ``InvalidRequestError``."""
    params, side = request.sampling_params, token_side(od_config)
    if params.max_sequence_length > _MAX_TEXT_TOKENS:
        raise InvalidRequestError(
            f"max_sequence_length={params.max_sequence_length} must be at most {_MAX_TEXT_TOKENS}",
            param="max_sequence_length",
        )
    for fields in (_POSITIVE, _NEGATIVE):
        _check_embeds(od_config, request, fields)
    num_tokens = (params.height // side) * (params.width // side)
    check_given_latents(request, (num_tokens, od_config.tf_model_config["in_channels"]))


def _check_embeds(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest, fields: _TextFields) -> None:
    transformer, max_length = od_config.tf_model_config, request.sampling_params.max_sequence_length
    given: Mapping[str, Any] = request.prompt
    if (fields.embeds in given) != (fields.pooled in given):
        missing, present = sorted((fields.embeds, fields.pooled), key=lambda name: name in given)
        raise InvalidRequestError(f"{present} came without {missing}; this model needs both", param=missing)
    if fields.embeds not in given:
        return
    for name, width in (
        (fields.embeds, transformer["joint_attention_dim"]),
        (fields.pooled, transformer["pooled_projection_dim"]),
    ):
        if given[name].shape[-1] != width:
            raise InvalidRequestError(f"{name} has width {given[name].shape[-1]}, the model's is {width}", param=name)
    num_tokens = given[fields.embeds].shape[-2]
    if num_tokens > max_length:
        raise InvalidRequestError(
            f"{fields.embeds} has {num_tokens} tokens, max_sequence_length is {max_length}", param=fields.embeds
        )
