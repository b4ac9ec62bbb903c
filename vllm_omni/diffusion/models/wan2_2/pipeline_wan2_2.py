"""Wan 2.1 and 2.2 text to video (arXiv:2503.20314), from the folder layout of diffusers.

Wan 2.2 A14B changes its transformer where noise gives way to detail. Wan 2.2 TI2V-5B takes a picture if there is one,
and makes it the first frame.

Shapes: N outputs, B rows, C latent channels, F H W latent frames, height and width, T text tokens, J text width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import T5TokenizerFast, UMT5EncoderModel

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, RequestSpec, SameAs
from vllm_omni.diffusion.denoise import Conditions, DenoiseState, denoise
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache
from vllm_omni.diffusion.encoders.text import (
    check_prompt_embeds,
    clean_text,
    encode_zero_padded_prompt,
    zero_padded,
)
from vllm_omni.diffusion.encoders.vae import decode_latents, encode_pixels
from vllm_omni.diffusion.guidance import Guidance, classifier_free
from vllm_omni.diffusion.latents import check_given_latents, check_num_frames, initial_noise
from vllm_omni.diffusion.model_loader.components import load_autoencoder, load_text_encoder, load_tokenizer
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.models.wan2_2.checkpoint import WanCheckpoint
from vllm_omni.diffusion.models.wan2_2.picture import PICTURE_KEY, PIXELS, prepare_picture
from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel
from vllm_omni.diffusion.postprocess import videos_from_pixels
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import NUM_TRAIN_TIMESTEPS
from vllm_omni.diffusion.schedulers.flow_schedule import check_scheduler_config, flow_schedule
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.errors import InvalidRequestError

_MAX_TEXT_TOKENS = 512
_EXPERTS = ("transformer", "transformer_2")  # of high and of low noise


def get_wan_pre_process_func(od_config: OmniDiffusionConfig) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """A function that prepares the picture of a request that has one."""
    checkpoint = WanCheckpoint.read(od_config)
    return functools.partial(prepare_picture, checkpoint, None)


def get_wan_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """A function from pixels ``[N, 3, frames, height, width]`` in [-1, 1] to videos."""
    return videos_from_pixels


class WanPipeline(nn.Module):
    """Text to video with classifier-free guidance."""

    # Padded text tokens take part in attention, so that requests of different lengths cannot be padded to one.
    sequence_conditions: ClassVar[Mapping[str, str]] = {}
    caches_prompt_embeds: ClassVar[bool] = True

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.dtype = od_config.torch_dtype
        self.checkpoint = WanCheckpoint.read(od_config)
        self.scheduler_config = od_config.component_config("scheduler", "scheduler_config.json")
        check_scheduler_config(self.scheduler_config)
        self.tokenizer = load_tokenizer(T5TokenizerFast, od_config)
        self.text_encoder = load_text_encoder(UMT5EncoderModel, od_config)
        self.vae = load_autoencoder(AutoencoderKLWan, od_config)
        self.prompt_embed_cache = PromptEmbedCache.from_config(od_config)
        self.weights_sources = []
        for name in _EXPERTS if self.checkpoint.boundary_ratio is not None else _EXPERTS[:1]:
            config = get_transformer_config_kwargs(od_config.component_config(name), WanTransformer3DModel)
            self.add_module(name, WanTransformer3DModel(od_config=od_config, **config))
            self.weights_sources.append(
                DiffusersPipelineLoader.ComponentSource(
                    model_or_path=od_config.model, subfolder=name, prefix=f"{name}."
                )
            )

    @classmethod
    def request_spec(cls, od_config: OmniDiffusionConfig) -> RequestSpec:
        """Only a checkpoint of two transformers takes a ``guidance_scale_2``."""
        checkpoint = WanCheckpoint.read(od_config)
        defaults: dict[str, Any] = {
            **checkpoint.usual_video,
            "num_inference_steps": 50,
            "guidance_scale": 5.0,
            "max_sequence_length": _MAX_TEXT_TOKENS,
        }
        if checkpoint.boundary_ratio is not None:
            defaults["guidance_scale_2"] = SameAs("guidance_scale")
        prompt_keys = {"prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"}
        return RequestSpec(
            defaults=defaults,
            tasks=("text-to-video", "image-to-video") if checkpoint.expand_timesteps else ("text-to-video",),
            cfg_parameters=tuple(name for name in ("guidance_scale", "guidance_scale_2") if name in defaults),
            size_multiple=checkpoint.size_multiple,
            temporal_factor=checkpoint.temporal_factor,
            prompt_keys=frozenset(prompt_keys | ({PICTURE_KEY} if checkpoint.expand_timesteps else set())),
            check=functools.partial(_check_request, checkpoint),
        )

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState:
        """Encode prompts and picture, draw the noise, lay out noise levels and experts."""
        params = request.sampling_params
        schedule = flow_schedule(request, self.scheduler_config)
        texts = [("prompt", "prompt_embeds")]
        if params.guidance_scale > 1:
            texts.append(("negative_prompt", "negative_prompt_embeds"))
        latents = self._initial_latents(request)
        shared = self.picture_conditions(request, latents)
        branches = tuple(
            {"encoder_hidden_states": self._encode(request, text, embeds), **shared} for text, embeds in texts
        )
        experts = self._experts(schedule.timesteps)
        by_expert = {name: {"expert": name} for name in experts}
        guidance = None
        if len(branches) > 1:
            scales = [params.guidance_scale if name == _EXPERTS[0] else params.guidance_scale_2 for name in experts]
            guidance = Guidance(
                scale=torch.tensor(scales, dtype=torch.float32, device=self.device), combine=classifier_free
            )
        return DenoiseState(
            request_id=request.request_id,
            latents=latents,
            sigmas=schedule.sigmas.to(self.device),
            timesteps=schedule.timesteps.to(self.device),
            branches=branches,
            step_conditions=tuple(by_expert[name] for name in experts),
            sampler=schedule.sampler,
            guidance=guidance,
            height=params.height,
            width=params.width,
        )

    def picture_conditions(self, request: OmniDiffusionRequest, latents: torch.Tensor) -> dict[str, Any]:
        """Conditions of the request's picture, and its place in the initial ``latents [N, C, F, H, W]``."""
        if PIXELS not in request.extra:
            return {}
        latents[:, :, :1] = encode_pixels(self.vae, request.extra[PIXELS])
        return {"keeps_first_frame": True}

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, C, F, H, W], timestep [B] in [0, 1000] -> velocity [B, C, F, H, W]``.

        ``expert`` names the transformer. ``channels`` are further input channels. With ``keeps_first_frame`` the
        first latent frame has no noise: its timestep is 0, and it does not move.
        """
        inputs = dict(conditions)
        transformer = self.get_submodule(inputs.pop("expert"))
        keeps_first_frame = inputs.pop("keeps_first_frame", False)
        latents = latents.to(self.dtype)
        if "channels" in inputs:
            latents = torch.cat([latents, inputs.pop("channels")], dim=1)
        if keeps_first_frame:
            timestep = timestep[:, None].repeat(1, latents.shape[2])
            timestep[:, 0] = 0
        velocity: torch.Tensor = transformer(latents, timestep, **inputs)
        if keeps_first_frame:
            velocity[:, :, 0] = 0
        return velocity

    def decode(self, state: DenoiseState) -> torch.Tensor:
        """``-> pixels [N, 3, frames, height, width] in [-1, 1]``."""
        return decode_latents(self.vae, state.latents)

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        return denoise(self, req)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # Some checkpoints of Wan 2.1 hold a norm of a projection that never was.
        used = ((name, tensor) for name, tensor in weights if ".norm_added_q." not in name)
        return AutoWeightsLoader(self).load_weights(used)

    def _encode(self, request: OmniDiffusionRequest, text: str, embeds: str) -> torch.Tensor:
        """Hidden states of one text of the request, padded with zeros: ``[1, T, J]``. A missing text is empty."""
        max_length = request.sampling_params.max_sequence_length
        given: Any = request.prompt.get(embeds)
        if given is not None:
            return zero_padded(given.to(self.device, self.dtype).view(1, -1, given.shape[-1]), max_length)
        if self.tokenizer is None:
            raise InvalidRequestError(f"the model has no tokenizer; give {embeds} instead of {text}", param=text)
        cleaned = clean_text(str(request.prompt.get(text, "")))
        return self.prompt_embed_cache.get(
            (cleaned, max_length),
            lambda: encode_zero_padded_prompt(
                self.text_encoder, self.tokenizer, cleaned, max_length=max_length, param=text
            ),
        )

    def _initial_latents(self, request: OmniDiffusionRequest) -> torch.Tensor:
        """``[N, C, F, H, W]`` in float32; a given tensor is copied, for a picture may be put into it."""
        params = request.sampling_params
        if params.latents is not None:
            return params.latents.to(self.device, torch.float32, copy=True)
        shape = self.checkpoint.latent_shape(params.num_frames, params.height, params.width)
        return initial_noise(request, shape, torch.float32, self.device)

    def _experts(self, timesteps: torch.Tensor) -> list[str]:
        """Name of the transformer of each step."""
        boundary = self.checkpoint.boundary_ratio
        if boundary is None:
            return [_EXPERTS[0]] * len(timesteps)
        return [_EXPERTS[timestep < boundary * NUM_TRAIN_TIMESTEPS] for timestep in timesteps.tolist()]


def _check_request(checkpoint: WanCheckpoint, request: OmniDiffusionRequest) -> None:
    """What can be known before any tensor is computed. Raises ``InvalidRequestError``."""
    params = request.sampling_params
    if params.max_sequence_length > _MAX_TEXT_TOKENS:
        raise InvalidRequestError(
            f"max_sequence_length={params.max_sequence_length} must be at most {_MAX_TEXT_TOKENS}",
            param="max_sequence_length",
        )
    if params.guidance_scale <= 1 and params.guidance_scale_2 is not None and params.guidance_scale_2 > 1:
        raise InvalidRequestError(
            f"guidance_scale_2={params.guidance_scale_2} has no effect at guidance_scale={params.guidance_scale}, which"
            " switches guidance off for all steps; raise guidance_scale above 1, or lower guidance_scale_2 to 1",
            param="guidance_scale_2",
        )
    check_num_frames(request, checkpoint.temporal_factor)
    check_prompt_embeds(request, checkpoint.text_dim)
    shape = checkpoint.latent_shape(params.num_frames, params.height, params.width)
    if shape[1] > checkpoint.rope_max_seq_len:
        limit = (checkpoint.rope_max_seq_len - 1) * checkpoint.temporal_factor + 1
        raise InvalidRequestError(f"num_frames={params.num_frames} must be at most {limit}", param="num_frames")
    check_given_latents(request, shape)
