"""Qwen-Image text to image (arXiv:2508.02324), from the folder layout of diffusers.

Shapes: N outputs, L text tokens, J width of the text encoder, I image tokens, C latent channels of a packed token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.text import encode_templated_prompt
from vllm_omni.diffusion.encoders.vae import decode_latents
from vllm_omni.diffusion.guidance import Guidance, classifier_free_norm_preserving
from vllm_omni.diffusion.latents import check_given_latents, initial_noise, pack_latents, unpack_latents
from vllm_omni.diffusion.model_loader.components import load_autoencoder, load_text_encoder, load_tokenizer
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler, request_sigmas, resolution_shift
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.errors import InvalidRequestError

_PATCH_SIZE = 2
_PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# The system message and the user's header: the transformer was trained without their hidden states.
_NUM_TEMPLATE_TOKENS = 34
_MAX_TEXT_TOKENS = 1024


def get_qwen_image_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, H, W]`` in [-1, 1] to pictures."""
    return images_from_pixels


class QwenImagePipeline(nn.Module):
    """Text to image with true classifier-free guidance."""

    sequence_conditions: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "encoder_hidden_states_mask"}

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.dtype = od_config.torch_dtype
        self.scheduler_config = od_config.component_config("scheduler", "scheduler_config.json")
        self.vae_scale_factor = _vae_scale_factor(od_config)
        self.tokenizer = load_tokenizer(Qwen2Tokenizer, od_config)
        # Vision tower and language head take no part in text to image, so they are not kept.
        self.text_encoder = load_text_encoder(Qwen2_5_VLForConditionalGeneration, od_config).model.language_model
        self.vae = load_autoencoder(AutoencoderKLQwenImage, od_config)
        self.transformer = QwenImageTransformer2DModel(
            od_config=od_config,
            **get_transformer_config_kwargs(od_config.tf_model_config, QwenImageTransformer2DModel),
        )
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model, subfolder="transformer", prefix="transformer."
            )
        ]

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Defaults of diffusers' pipeline. Only a guidance-distilled checkpoint takes a ``guidance_scale``."""
        scale_factor = _vae_scale_factor(od_config)
        defaults: dict[str, Any] = {
            "height": 128 * scale_factor,
            "width": 128 * scale_factor,
            "num_inference_steps": 50,
            "true_cfg_scale": 4.0,
            "max_sequence_length": 512,
        }
        if od_config.tf_model_config.get("guidance_embeds"):
            defaults["guidance_scale"] = 1.0
        return RequestSpec(
            defaults=defaults,
            size_multiple=scale_factor * _PATCH_SIZE,
            prompt_keys=frozenset({"prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"}),
            check=functools.partial(_check_request, od_config),
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode the prompts, draw the noise and lay out the noise levels."""
        params = request.sampling_params
        rows, columns = _token_grid(request, self.vae_scale_factor)
        texts = [("prompt", "prompt_embeds")]
        if params.true_cfg_scale > 1:
            texts.append(("negative_prompt", "negative_prompt_embeds"))
        branches = tuple(self._conditions(request, text, embeds, rows, columns) for text, embeds in texts)
        mu = resolution_shift(rows * columns, self.scheduler_config)
        sigmas = request_sigmas(request, mu, self.scheduler_config).to(self.device)
        guidance = None
        if len(branches) > 1:
            scale = sigmas.new_full((sigmas.shape[0] - 1,), params.true_cfg_scale)
            guidance = Guidance(scale=scale, combine=classifier_free_norm_preserving)
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
            # Rounded in the model's dtype before the division, as the checkpoint's pipeline does.
            timestep=timestep.to(self.dtype) / 1000,
            **conditions,
        )
        return prediction

    def decode(self, state: DenoiseState) -> torch.Tensor:
        """``-> pixels [N, 3, height, width] in [-1, 1]``."""
        rows, columns = (side // (self.vae_scale_factor * _PATCH_SIZE) for side in (state.height, state.width))
        latents = unpack_latents(state.latents, rows, columns, _PATCH_SIZE)
        return decode_latents(self.vae, latents.unsqueeze(2))[:, :, 0]

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return denoise(self, req)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def _conditions(
        self, request: OmniDiffusionRequest, text: str, embeds: str, rows: int, columns: int
    ) -> dict[str, Any]:
        conditions: dict[str, Any] = {
            "encoder_hidden_states": self._encode(request, text, embeds),
            "img_shapes": ((1, rows, columns),),
        }
        guidance_scale = request.sampling_params.guidance_scale
        if guidance_scale is not None:
            conditions["guidance"] = torch.full((1,), guidance_scale, device=self.device)
        return conditions

    def _encode(self, request: OmniDiffusionRequest, text: str, embeds: str) -> torch.Tensor:
        """Hidden states of one text of the request, ``[1, L, J]``."""
        given: Any = request.prompt.get(embeds)
        if given is not None:
            return given.to(self.device, self.dtype).view(1, -1, given.shape[-1])
        if self.tokenizer is None:
            raise InvalidRequestError(f"the model has no tokenizer; give {embeds} instead of {text}", param=text)
        return encode_templated_prompt(
            self.text_encoder,
            self.tokenizer,
            str(request.prompt.get(text)),
            template=_PROMPT_TEMPLATE,
            num_dropped_tokens=_NUM_TEMPLATE_TOKENS,
            max_length=request.sampling_params.max_sequence_length,
            param=text,
        )

    def _initial_latents(self, request: OmniDiffusionRequest, rows: int, columns: int) -> torch.Tensor:
        given = request.sampling_params.latents
        if given is not None:
            return given.to(self.device)
        shape = (self.vae.config.z_dim, rows * _PATCH_SIZE, columns * _PATCH_SIZE)
        return pack_latents(initial_noise(request, shape, self.dtype, self.device), _PATCH_SIZE)


def _vae_scale_factor(od_config: OmniDiffusionConfig) -> int:
    """Pixels per latent pixel and side."""
    return int(2 ** len(od_config.component_config("vae")["temperal_downsample"]))


def _token_grid(request: OmniDiffusionRequest, vae_scale_factor: int) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    params = request.sampling_params
    side = vae_scale_factor * _PATCH_SIZE
    return params.height // side, params.width // side


def _check_request(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    """What can be known before any tensor is computed. Raises ``InvalidRequestError``."""
    params, transformer = request.sampling_params, od_config.tf_model_config
    if params.max_sequence_length > _MAX_TEXT_TOKENS:
        raise InvalidRequestError(
            f"max_sequence_length={params.max_sequence_length} must be at most {_MAX_TEXT_TOKENS}",
            param="max_sequence_length",
        )
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds: Any = request.prompt.get(name)
        if embeds is None:
            continue
        if embeds.shape[-1] != transformer["joint_attention_dim"]:
            raise InvalidRequestError(
                f"{name} has width {embeds.shape[-1]}, the model's is {transformer['joint_attention_dim']}", param=name
            )
        if embeds.shape[-2] > params.max_sequence_length:
            raise InvalidRequestError(
                f"{name} has {embeds.shape[-2]} tokens, max_sequence_length is {params.max_sequence_length}", param=name
            )
    rows, columns = _token_grid(request, _vae_scale_factor(od_config))
    check_given_latents(request, (rows * columns, transformer["in_channels"]))
