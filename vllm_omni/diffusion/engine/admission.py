"""The door: a prompt and its parameters become a request whose every default is resolved, or an error.

The order of authority for an absent parameter: the checkpoint's ``sampling_defaults.json``, then what the model's
pre-process function derives from the request (a size from a picture), then the pipeline.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec, SameAs, read_json
from vllm_omni.diffusion.denoise import is_stepped
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest, new_request_id
from vllm_omni.errors import InvalidModelFolderError, InvalidRequestError
from vllm_omni.inputs.data import (
    MAX_PIXELS,
    MAX_SEED,
    MAX_VIDEO_PIXELS,
    OmniDiffusionSamplingParams,
    normalize_prompt,
)

SAMPLING_DEFAULTS_FILE = "sampling_defaults.json"

# Parameters that a model may or may not have; all others work the same for every model.
_MODEL_PARAMETERS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "max_sequence_length",
    "num_frames",
    "fps",
)


class Door:
    """What requests one model takes, known from its configuration files: before its weights are read."""

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        model = resolve_diffusion_model(od_config.model_class_name)
        self.spec = model.request_spec(od_config)
        self._device_type = od_config.torch_device.type
        self.checkpoint_defaults = read_sampling_defaults(od_config)
        self._pre_process = model.pre_process(od_config)
        self.is_stepped = is_stepped(model.pipeline_class)

    @property
    def output_kind(self) -> Literal["image", "video"]:
        """Models of videos are those that take a number of frames."""
        return "video" if self.spec is not None and "num_frames" in self.spec.defaults else "image"

    @property
    def decodes_pictures(self) -> bool:
        """Whether an output is one picture, rather than a video or several layers."""
        return self.output_kind == "image" and (self.spec is None or "image-to-layers" not in self.spec.tasks)

    def admit(self, prompt: Any, params: OmniDiffusionSamplingParams) -> OmniDiffusionRequest:
        """A request with all defaults resolved, pre-processed. Raises ``InvalidRequestError``."""
        request = admit(prompt, params, self.spec, self.checkpoint_defaults, self._pre_process)
        generator = request.sampling_params.generator
        if generator is not None and generator.device.type not in ("cpu", self._device_type):
            raise InvalidRequestError(
                f"generator is on {generator.device}, the model on {self._device_type}; use torch.Generator('cpu')",
                param="generator",
            )
        if self.is_stepped and request.sampling_params.num_inference_steps is None:
            raise InvalidRequestError(
                "num_inference_steps is not set, and the pipeline's request_spec has no default for it; set it",
                param="num_inference_steps",
            )
        return request


def read_sampling_defaults(od_config: OmniDiffusionConfig) -> dict[str, Any]:
    """The checkpoint's own defaults: sampling parameters by name, and ``negative_prompt``. Empty if it has none."""
    path = Path(od_config.model) / SAMPLING_DEFAULTS_FILE
    if not path.exists():
        return {}
    defaults = read_json(path)
    if not isinstance(defaults, dict):
        raise InvalidModelFolderError(f"{path} must hold a JSON object")
    try:
        OmniDiffusionSamplingParams(**{key: value for key, value in defaults.items() if key != "negative_prompt"})
        normalize_prompt({"prompt": "", "negative_prompt": defaults.get("negative_prompt")})
    except InvalidRequestError as error:
        raise InvalidModelFolderError(f"{path}: {error}") from error
    return defaults


def admit(
    prompt: Any,
    params: OmniDiffusionSamplingParams,
    spec: RequestSpec | None,
    checkpoint_defaults: Mapping[str, Any],
    pre_process: Callable[[OmniDiffusionRequest], Any] | None = None,
) -> OmniDiffusionRequest:
    """A resolved request. Raises ``InvalidRequestError`` that names the field.

    ``spec`` is None for a pipeline that says nothing about its requests: it gets the parameters as they came.
    ``pre_process`` is the model's own function over the request. It runs before the pipeline's defaults are filled
    in, so that it may set a parameter that the request leaves open.
    """
    normalized = normalize_prompt(prompt)
    params.validate()  # the fields may have been assigned since construction
    params = dataclasses.replace(params)
    params.num_outputs_per_prompt = 1 if params.num_outputs_per_prompt is None else params.num_outputs_per_prompt
    params.output_type = "pil" if params.output_type is None else params.output_type
    _resolve_seed(params)
    request = OmniDiffusionRequest(request_id=new_request_id(), prompts=[normalized], sampling_params=params)
    if spec is not None:
        _refuse_unsupported(request, spec)
    schedule = params.sigmas if params.sigmas is not None else params.timesteps
    if schedule is not None:
        params.num_inference_steps = len(schedule)
    if spec is not None:
        _apply_checkpoint_defaults(request, spec, checkpoint_defaults)
        # Before the pre-process function, which may bring a picture to this size.
        _check_size(params, spec)
    if pre_process is not None:
        request = _pre_processed(request, pre_process)
    if spec is not None:
        _resolve_model_parameters(request, spec)
    return request


def _pre_processed(
    request: OmniDiffusionRequest, pre_process: Callable[[OmniDiffusionRequest], Any]
) -> OmniDiffusionRequest:
    processed = pre_process(request)
    if not isinstance(processed, OmniDiffusionRequest):
        raise TypeError(f"the model's pre-process function returned {type(processed).__name__}, no request")
    return processed


def _apply_checkpoint_defaults(
    request: OmniDiffusionRequest, spec: RequestSpec, checkpoint_defaults: Mapping[str, Any]
) -> None:
    params, prompt = request.sampling_params, request.prompt
    if "negative_prompt" in checkpoint_defaults and "negative_prompt_embeds" not in prompt:
        prompt.setdefault("negative_prompt", checkpoint_defaults["negative_prompt"])
    _resolve_true_cfg_scale(request, spec, checkpoint_defaults)
    for name in spec.defaults:
        if getattr(params, name) is None:
            setattr(params, name, checkpoint_defaults.get(name))
    params.extra_args = {**spec.extra_args, **checkpoint_defaults.get("extra_args", {}), **params.extra_args}


def _resolve_model_parameters(request: OmniDiffusionRequest, spec: RequestSpec) -> None:
    params = request.sampling_params
    for name, default in spec.defaults.items():
        if getattr(params, name) is None:
            resolved = getattr(params, default.parameter) if isinstance(default, SameAs) else default
            setattr(params, name, resolved)
    _check_size(params, spec)
    if spec.check is not None:
        spec.check(request)


def _refuse_unsupported(request: OmniDiffusionRequest, spec: RequestSpec) -> None:
    params = request.sampling_params
    for name in _MODEL_PARAMETERS:
        if getattr(params, name) is not None and name not in spec.defaults:
            raise InvalidRequestError(
                f"{name}={getattr(params, name)} is not a parameter of this model, which takes"
                f" {', '.join(sorted(spec.defaults))}; leave it out",
                param=name,
            )
    for name in params.extra_args:
        if name not in spec.extra_args:
            allowed = ", ".join(sorted(spec.extra_args)) if spec.extra_args else "none"
            raise InvalidRequestError(
                f"extra_args: this model has no parameter {name!r}; allowed: {allowed}", param=f"extra_args.{name}"
            )
    for key in request.prompt:
        if key == "multi_modal_data" and key not in spec.prompt_keys:
            does = f"; it does {', '.join(spec.tasks)}" if spec.tasks else ""
            raise InvalidRequestError(
                f"this model takes no picture (multi_modal_data){does}. Leave the picture out, or choose a task or a"
                " model that starts from one",
                param="multi_modal_data",
            )
        if key not in spec.prompt_keys:
            raise InvalidRequestError(
                f"this model takes no {key} in a prompt, only {', '.join(sorted(spec.prompt_keys))}", param=key
            )
    if params.output_type not in spec.output_types:
        raise InvalidRequestError(
            f"output_type={params.output_type!r} must be one of {', '.join(spec.output_types)}", param="output_type"
        )


def _resolve_true_cfg_scale(
    request: OmniDiffusionRequest, spec: RequestSpec, checkpoint_defaults: Mapping[str, Any]
) -> None:
    """Classifier-free guidance needs a negative prompt: without one it is off, and asking for it is an error.

    So is a negative prompt without a scale, for a model whose guidance is off unless asked for.
    """
    if "true_cfg_scale" not in spec.defaults:
        return
    params = request.sampling_params
    default_scale = checkpoint_defaults.get("true_cfg_scale", spec.defaults["true_cfg_scale"])
    has_negative = "negative_prompt" in request.prompt or "negative_prompt_embeds" in request.prompt
    if has_negative:
        if params.true_cfg_scale is None and default_scale <= 1 and "negative_prompt" not in checkpoint_defaults:
            raise InvalidRequestError(
                f"a negative prompt has no effect at true_cfg_scale={default_scale:g}, this model's default; set"
                " true_cfg_scale above 1, or leave the negative prompt out",
                param="negative_prompt",
            )
        return
    if params.true_cfg_scale is not None and params.true_cfg_scale > 1:
        raise InvalidRequestError(
            f"true_cfg_scale={params.true_cfg_scale} needs a negative prompt; give one, if only"
            " {'prompt': ..., 'negative_prompt': ' '}, or leave true_cfg_scale out",
            param="negative_prompt",
        )
    params.true_cfg_scale = 1.0


def _check_size(params: OmniDiffusionSamplingParams, spec: RequestSpec) -> None:
    """A side off the model's grid, or a size that no memory holds, which would end the process, not the request."""
    multiple = spec.size_multiple
    for name in ("height", "width"):
        value = getattr(params, name)
        if value is not None and value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise InvalidRequestError(
                f"{name}={value} must be a multiple of {multiple}; the nearest is {nearest}", param=name
            )
    if params.height is not None and params.width is not None and params.height * params.width > MAX_PIXELS:
        raise InvalidRequestError(
            f"height={params.height} and width={params.width} make {params.height * params.width:,} pixels; at most"
            f" {MAX_PIXELS:,} (4096 x 4096) are taken",
            param="height",
        )
    if params.height is not None and params.width is not None and params.num_frames is not None:
        num_pixels = params.num_frames * params.height * params.width
        if num_pixels > MAX_VIDEO_PIXELS:
            raise InvalidRequestError(
                f"num_frames={params.num_frames} of {params.height} x {params.width} make {num_pixels:,} pixels; at"
                f" most {MAX_VIDEO_PIXELS:,} (1035 frames of 1080 x 1920) are taken",
                param="num_frames",
            )


def _resolve_seed(params: OmniDiffusionSamplingParams) -> None:
    if params.generator is not None:
        return
    if params.seed is None:
        # 32 bits are enough to never meet twice, and short enough to read out and type in again.
        params.seed = secrets.randbits(32)
    assert params.num_outputs_per_prompt is not None, "resolved before the seed"
    last = params.seed + params.num_outputs_per_prompt - 1
    if last > MAX_SEED:
        raise InvalidRequestError(
            f"seed={params.seed}: output i uses seed + i, and the last one would exceed {MAX_SEED}", param="seed"
        )


def take_noise(params: OmniDiffusionSamplingParams) -> None:
    """Give a request a generator of its own, and let the caller's, where it came from, go on to other noise.

    The request's begins where the caller's is. That one is seeded anew by its state: how many numbers the request will
    draw only its ranks know, each with a copy, and a later request must not draw the same ones.
    """
    given = params.generator
    if given is not None:
        params.generator = given.clone_state()
        digest = hashlib.sha256(given.get_state().numpy().tobytes()).digest()
        given.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
