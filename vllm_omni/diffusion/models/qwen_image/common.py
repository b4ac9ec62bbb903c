"""What the pipelines of Qwen-Image share (arXiv:2508.02324).

Shapes: N outputs, L text tokens, J width of the text encoder, I noisy image tokens, M tokens of given pictures,
C latent channels of a packed token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoise import Conditions, DenoiseState
from vllm_omni.diffusion.encoders.causal_conv import use_single_frame_convolutions
from vllm_omni.diffusion.encoders.vae import decode_latents
from vllm_omni.diffusion.guidance import CombineRule, Guidance, classifier_free_norm_preserving
from vllm_omni.diffusion.latents import initial_noise, pack_latents, unit_timestep, unpack_latents
from vllm_omni.diffusion.model_loader.components import load_autoencoder
from vllm_omni.diffusion.model_loader.diffusers_loader import ComponentSource
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.errors import InvalidRequestError

PATCH_SIZE = 2
PROMPT_KEYS = frozenset({"prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"})
TEXT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# The system message and the user's header: the transformer was trained without their hidden states.
NUM_TEXT_TEMPLATE_TOKENS = 34
_MAX_TEXT_TOKENS = 1024


def load_transformer(od_config: OmniDiffusionConfig) -> QwenImageTransformer2DModel:
    """The transformer that the checkpoint describes, without its weights."""
    kwargs = get_transformer_config_kwargs(od_config.tf_model_config, QwenImageTransformer2DModel)
    return QwenImageTransformer2DModel(od_config=od_config, **kwargs)


def load_vae(od_config: OmniDiffusionConfig) -> Any:
    """The autoencoder, which was made for videos. These models encode and decode single frames."""
    vae = load_autoencoder(AutoencoderKLQwenImage, od_config)
    use_single_frame_convolutions(vae)
    return vae


def transformer_weights(od_config: OmniDiffusionConfig) -> list[ComponentSource]:
    """Where the weights of the transformer come from."""
    return [ComponentSource(model_or_path=od_config.model, subfolder="transformer", prefix="transformer.")]


def vae_scale_factor(od_config: OmniDiffusionConfig) -> int:
    """Pixels per latent pixel and side."""
    return int(2 ** len(od_config.component_config("vae")["temperal_downsample"]))


def request_defaults(od_config: OmniDiffusionConfig) -> dict[str, Any]:
    """Defaults that diffusers' pipelines share. Only a guidance-distilled checkpoint takes a ``guidance_scale``."""
    defaults: dict[str, Any] = {"num_inference_steps": 50, "true_cfg_scale": 4.0, "max_sequence_length": 512}
    if od_config.tf_model_config.get("guidance_embeds"):
        defaults["guidance_scale"] = 1.0
    return defaults


def check_texts(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    """Raises ``InvalidRequestError`` for texts and embeddings that the text side of the model cannot take."""
    params, width = request.sampling_params, od_config.tf_model_config["joint_attention_dim"]
    if params.max_sequence_length > _MAX_TEXT_TOKENS:
        raise InvalidRequestError(
            f"max_sequence_length={params.max_sequence_length} must be at most {_MAX_TEXT_TOKENS}",
            param="max_sequence_length",
        )
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds: Any = request.prompt.get(name)
        if embeds is not None and embeds.shape[-1] != width:
            raise InvalidRequestError(f"{name} has width {embeds.shape[-1]}, the model's is {width}", param=name)


def check_embeds_length(request: OmniDiffusionRequest) -> None:
    """Raises ``InvalidRequestError`` for embeddings of more text than ``max_sequence_length`` allows."""
    limit = request.sampling_params.max_sequence_length
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds: Any = request.prompt.get(name)
        if embeds is not None and embeds.shape[-2] > limit:
            raise InvalidRequestError(
                f"{name} has {embeds.shape[-2]} tokens, max_sequence_length is {limit}", param=name
            )


def token_grid(height: int, width: int, scale_factor: int) -> tuple[int, int]:
    """Rows and columns of image tokens of a picture of ``height`` x ``width`` pixels."""
    side = scale_factor * PATCH_SIZE
    return height // side, width // side


def initial_latents(
    request: OmniDiffusionRequest, frame: Sequence[int], num_frames: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Given latents, or noise of ``num_frames`` frames ``[C, H, W]`` each: ``[N, I, C]`` in float32."""
    given = request.sampling_params.latents
    if given is not None:
        return given.to(device).float()
    noise = initial_noise(request, (num_frames, *frame), dtype, device)
    return pack_latents(noise.flatten(0, 1), PATCH_SIZE).unflatten(0, (-1, num_frames)).flatten(1, 2).float()


def text_branches(
    request: OmniDiffusionRequest, encode: Callable[[str, str], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """Embeddings ``[1, L, J]`` of the prompt and, with guidance, of the negative prompt.

    ``encode`` takes a text and the name of its field, and is not called for embeddings that are given.
    """
    texts = [("prompt", "prompt_embeds")]
    if request.sampling_params.true_cfg_scale > 1:
        texts.append(("negative_prompt", "negative_prompt_embeds"))
    for text, embeds in texts:
        given: Any = request.prompt.get(embeds)
        if given is None:
            yield encode(str(request.prompt.get(text)), text)
        else:
            yield given.to(device, dtype).view(1, -1, given.shape[-1])


def require_processors(text: str, *processors: Any) -> None:
    """Raises ``InvalidRequestError`` where a model of random weights lacks what prepares ``text`` for its encoder."""
    if None in processors:
        raise InvalidRequestError(
            f"the model's folder has no tokenizer or no processor; give {text}_embeds instead of {text}", param=text
        )


def denoise_state(
    request: OmniDiffusionRequest,
    *,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: Iterator[torch.Tensor],
    conditions: Conditions,
    combine: CombineRule = classifier_free_norm_preserving,
) -> DenoiseState:
    """The state before the first step. ``conditions`` are those of every branch but for its text."""
    params = request.sampling_params
    shared = dict(conditions)
    if params.guidance_scale is not None:
        shared["guidance"] = torch.full((1,), params.guidance_scale, device=latents.device)
    branches = tuple({"encoder_hidden_states": text, **shared} for text in embeds)
    guidance = None
    if len(branches) > 1:
        scale = sigmas.new_full((sigmas.shape[0] - 1,), params.true_cfg_scale)
        guidance = Guidance(scale=scale, combine=combine)
    return DenoiseState(
        request_id=request.request_id,
        latents=latents,
        sigmas=sigmas,
        timesteps=sigmas[:-1] * 1000,
        branches=branches,
        sampler=FlowMatchEuler(),
        guidance=guidance,
        height=params.height,
        width=params.width,
    )


def predict_velocity(
    transformer: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions, dtype: torch.dtype
) -> torch.Tensor:
    """``latents [B, I, C], timestep [B] in [0, 1000] -> velocity [B, I, C]``.

    The condition ``image_latents [B, M, C]``, if there is one, follows the noisy tokens through the transformer.
    """
    inputs = dict(conditions)
    image_latents = inputs.pop("image_latents", None)
    hidden_states = latents.to(dtype)
    if image_latents is not None:
        hidden_states = torch.cat([hidden_states, image_latents], dim=1)
    prediction: torch.Tensor = transformer(
        hidden_states=hidden_states,
        timestep=unit_timestep(timestep, dtype),
        **inputs,
    )
    return prediction[:, : latents.shape[1]]


def decode_picture(vae: Any, state: DenoiseState, scale_factor: int) -> torch.Tensor:
    """The latents of a state as ``pixels [N, 3, height, width] in [-1, 1]``."""
    rows, columns = token_grid(state.height, state.width, scale_factor)
    latents = unpack_latents(state.latents, rows, columns, PATCH_SIZE)
    return decode_latents(vae, latents.unsqueeze(2))[:, :, 0]
