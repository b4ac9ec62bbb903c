"""Qwen-Image-Layered: one picture, taken apart into RGBA layers (arXiv:2512.15603).

Shapes: N outputs, K layers of an output, L text tokens, J width of the text encoder, I noisy image tokens (those of
the whole picture and of each layer), C latent channels of a packed token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache, pictures_key
from vllm_omni.diffusion.encoders.text import encode_templated_prompt
from vllm_omni.diffusion.encoders.vae import decode_latents
from vllm_omni.diffusion.encoders.vision_language import PicturePrompts
from vllm_omni.diffusion.guidance import classifier_free, classifier_free_norm_preserving
from vllm_omni.diffusion.latents import check_given_latents, unpack_latents
from vllm_omni.diffusion.model_loader.components import (
    load_image_processor,
    load_text_encoder,
    load_tokenizer,
)
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.qwen_image import captions, common, pictures
from vllm_omni.diffusion.postprocess import images_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import euler_config, request_sigmas
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import prompt_images

_EXTRA_ARGS: Mapping[str, Any] = {"layers": 4, "resolution": 640, "cfg_normalize": False, "use_en_prompt": False}
_RESOLUTIONS = (640, 1024)  # pixels, of the side of a square picture
_MAX_LAYERS = 32
_MAX_CAPTION_TOKENS = 512
_ANY_LENGTH = 1 << 20
_BASE_TOKENS = 256  # for as many tokens of the picture the shift is 1


def get_qwen_image_layered_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that brings the picture of a request to the size that the model works at."""
    return functools.partial(_pre_process, pictures.side_multiple(od_config))


def get_qwen_image_layered_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, K, 4, H, W]`` in [-1, 1] to one entry per output, which holds its K layers.

    The layers of ``"pil"`` are a list of RGBA pictures from back to front, those of ``"np"`` an array
    ``[K, H, W, 4]``, those of ``"pt"`` a tensor ``[K, 4, H, W]``.
    """
    return _layers_from_pixels


class QwenImageLayeredPipeline(nn.Module):
    """Picture to RGBA layers, with true classifier-free guidance.

    The prompt describes the whole picture; of an empty one the vision-language encoder writes a caption. A request's
    ``extra_args`` take ``layers`` (their number), ``resolution`` (640 or 1024, of a square picture),
    ``cfg_normalize`` (guidance keeps the norm of the positive prediction) and ``use_en_prompt`` (the language of the
    caption: English instead of Chinese).
    """

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
        self.text_encoder = load_text_encoder(Qwen2_5_VLForConditionalGeneration, od_config)
        self.vae = common.load_vae(od_config)
        self.transformer = common.load_transformer(od_config)
        self.weights_sources = common.transformer_weights(od_config)
        self.prompt_embed_cache = PromptEmbedCache.from_config(od_config)

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Defaults of diffusers' pipeline. The size follows from the picture and ``resolution``, so none is taken."""
        return RequestSpec(
            defaults=common.request_defaults(od_config),
            tasks=("image-to-layers",),
            size_multiple=common.vae_scale_factor(od_config) * common.PATCH_SIZE,
            prompt_keys=pictures.PROMPT_KEYS,
            extra_args=_EXTRA_ARGS,
            check=functools.partial(_check_request, od_config),
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode the prompts and the picture, draw the noise and lay out the noise levels."""
        params, picture = request.sampling_params, request.extra["picture"]
        num_frames = params.extra_args["layers"] + 1
        rows, columns = common.token_grid(params.height, params.width, self.vae_scale_factor)
        frame = (self.vae.config.z_dim, rows * common.PATCH_SIZE, columns * common.PATCH_SIZE)
        image_latents, shapes = pictures.picture_latents(self.vae, [picture], self.dtype)
        mu = math.sqrt(image_latents.shape[1] / _BASE_TOKENS)
        return common.denoise_state(
            request,
            embeds=common.text_branches(request, functools.partial(self._encode, request), self.dtype, self.device),
            latents=common.initial_latents(request, frame, num_frames, self.dtype, self.device),
            sigmas=request_sigmas(request, mu, self.scheduler_config).to(self.device),
            conditions={
                "img_shapes": ((1, rows, columns),) * num_frames + shapes,
                "image_latents": image_latents,
                # Of the two kinds of pictures that the model knows, diffusers uses only the first.
                "additional_t_cond": torch.zeros(1, dtype=torch.long, device=self.device),
            },
            combine=classifier_free_norm_preserving if params.extra_args["cfg_normalize"] else classifier_free,
        )

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, I, C], timestep [B] in [0, 1000] -> velocity [B, I, C]``."""
        return common.predict_velocity(self.transformer, latents, timestep, conditions, self.dtype)

    def decode(self, state: DenoiseState) -> torch.Tensor:
        """``-> pixels [N, K, 4, height, width] in [-1, 1]``."""
        rows, columns = common.token_grid(state.height, state.width, self.vae_scale_factor)
        frames = state.latents.unflatten(1, (-1, rows * columns))
        # The first frame is the whole picture once more.
        latents = unpack_latents(frames[:, 1:].flatten(0, 1), rows, columns, common.PATCH_SIZE)
        pixels = decode_latents(self.vae, latents.unsqueeze(2))[:, :, 0]
        return pixels.unflatten(0, (state.num_outputs, -1))

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return denoise(self, req)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def _encode(self, request: OmniDiffusionRequest, text: str, param: str) -> torch.Tensor:
        """Hidden states of one text of the request, or of a caption in place of an empty prompt, ``[1, L, J]``."""
        common.require_processors(param, self.tokenizer, self.image_processor)
        max_length = request.sampling_params.max_sequence_length
        if param == "prompt" and text in ("", " "):
            return self._encode_caption(request, max_length)
        return self.prompt_embed_cache.get((text, max_length), lambda: self._encode_text(text, max_length, param))

    def _encode_caption(self, request: OmniDiffusionRequest, max_length: int) -> torch.Tensor:
        """A caption may be longer than the limit, which is the user's for texts of his own: then its end is cut off."""
        picture, in_english = request.extra["picture"], request.sampling_params.extra_args["use_en_prompt"]

        def encode() -> torch.Tensor:
            shown = PicturePrompts(self.text_encoder.model, self.tokenizer, self.image_processor, [picture])
            template = captions.ENGLISH if in_english else captions.CHINESE
            caption = shown.describe(self.text_encoder, template, _MAX_CAPTION_TOKENS)
            return self._encode_text(caption, _ANY_LENGTH, "prompt")[:, :max_length]

        return self.prompt_embed_cache.get((pictures_key([picture]), in_english, max_length), encode)

    def _encode_text(self, text: str, max_length: int, param: str) -> torch.Tensor:
        return encode_templated_prompt(
            self.text_encoder.model.language_model,
            self.tokenizer,
            text,
            template=common.TEXT_TEMPLATE,
            num_dropped_tokens=common.NUM_TEXT_TEMPLATE_TOKENS,
            max_length=max_length,
            param=param,
        )


def _pre_process(multiple: int, request: OmniDiffusionRequest) -> OmniDiffusionRequest:
    params = request.sampling_params
    _check_extra_args(params.extra_args)
    (picture,) = prompt_images(request.prompt, mode="RGBA")
    resized = pictures.fit_to_area(picture, params.extra_args["resolution"] ** 2, multiple)
    params.width, params.height = resized.size
    request.extra["picture"] = resized
    del request.prompt["multi_modal_data"]  # what is kept of it is smaller
    return request


def _check_extra_args(extra_args: Mapping[str, Any]) -> None:
    layers, resolution = extra_args["layers"], extra_args["resolution"]
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= _MAX_LAYERS:
        raise InvalidRequestError(
            f"layers={layers!r} must be an integer between 1 and {_MAX_LAYERS}", param="extra_args.layers"
        )
    if isinstance(resolution, bool) or resolution not in _RESOLUTIONS:
        allowed = " or ".join(str(side) for side in _RESOLUTIONS)
        raise InvalidRequestError(f"resolution={resolution!r} must be {allowed}", param="extra_args.resolution")
    for name in ("cfg_normalize", "use_en_prompt"):
        if not isinstance(extra_args[name], bool):
            raise InvalidRequestError(f"{name}={extra_args[name]!r} must be True or False", param=f"extra_args.{name}")


def _check_request(od_config: OmniDiffusionConfig, request: OmniDiffusionRequest) -> None:
    """What can be known before any tensor is computed. Raises ``InvalidRequestError``."""
    params = request.sampling_params
    common.check_texts(od_config, request)
    common.check_embeds_length(request)
    rows, columns = common.token_grid(params.height, params.width, common.vae_scale_factor(od_config))
    num_tokens = (params.extra_args["layers"] + 1) * rows * columns
    check_given_latents(request, (num_tokens, od_config.tf_model_config["in_channels"]))


def _layers_from_pixels(pixels: torch.Tensor, output_type: str = "pil") -> list[Any]:
    return [images_from_pixels(layers, output_type) for layers in pixels]
