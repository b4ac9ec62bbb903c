"""What a user hands in: prompts and sampling parameters, checked as far as no model is needed for it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Literal, TypedDict, Union

import torch

from vllm_omni.errors import InvalidRequestError, nearest_name

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "pt", "latent")

# torch.Generator takes seeds up to 2**64 - 1, but JSON clients keep integers exact only within 63 bits.
MAX_SEED = 2**63 - 1
MAX_SIDE = 16384
MAX_PIXELS = 4096 * 4096  # of one picture or frame
MAX_VIDEO_PIXELS = 1 << 31  # of all frames
MAX_STEPS = 10_000
MAX_OUTPUTS = 256
# Characters of a text: a tokenizer takes a second for a million of them, only to find that they are too many.
MAX_PROMPT_LENGTH = 32_000


class OmniPrompt(TypedDict, total=False):
    """One prompt as a dict.

    Embeddings are ``[L, D]`` or ``[1, L, D]`` without padding, pooled embeddings ``[D]`` or ``[1, D]``.
    """

    prompt: str
    negative_prompt: str
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    negative_pooled_prompt_embeds: torch.Tensor
    multi_modal_data: dict[str, Any]


PromptInput = Union[str, OmniPrompt]

_PROMPT_KEYS = tuple(OmniPrompt.__annotations__)


def _option(help_text: str, **extra: Any) -> Any:
    """A parameter that is absent unless given; ``help_text`` is what the command line shows."""
    return field(default=None, metadata={"help": help_text, **extra})


@dataclass(kw_only=True)
class OmniDiffusionSamplingParams:
    """How to sample. ``None`` means "the model's default", which admission fills in once; 0 and False are values.

    A parameter that the model cannot honour is an error (``InvalidRequestError``), never ignored.
    """

    height: int | None = _option("height of the output in pixels")
    width: int | None = _option("width of the output in pixels")
    num_inference_steps: int | None = _option("number of denoising steps", aliases=("--steps",))
    guidance_scale: float | None = _option(
        "guidance scale: an input of a guidance-distilled model, the scale of classifier-free guidance of one that uses"
        " it under this name; of a model without either, an error"
    )
    guidance_scale_2: float | None = _option(
        "guidance scale of the second expert of a model that changes experts between steps; the first one's if absent"
    )
    true_cfg_scale: float | None = _option(
        "scale of classifier-free guidance, which needs a negative prompt; 1 or less switches it off"
    )
    seed: int | None = _option("seed of the initial noise; output i of a request uses seed + i; drawn if absent")
    num_outputs_per_prompt: int | None = _option("number of outputs per prompt", aliases=("--n", "-n"))
    sigmas: Sequence[float] | None = _option(
        "noise levels in (0, 1], decreasing, one per step, before the model's shift", cli=False
    )
    timesteps: Sequence[float] | None = _option(
        "timesteps in (0, 1000], decreasing, one per step, used as they are (no shift)", cli=False
    )
    latents: torch.Tensor | None = _option("initial noise in the model's layout, one row per output", cli=False)
    generator: torch.Generator | None = _option("source of the initial noise, instead of a seed", cli=False)
    output_type: OutputType | None = _option("form of the outputs: pil (default), np, pt or latent", cli=False)
    max_sequence_length: int | None = _option("most text tokens that a prompt may have")
    num_frames: int | None = _option("number of frames of a video")
    fps: float | None = _option("frames per second of a video")
    extra_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "parameters that one model alone has, as a JSON object such as '{\"layers\": 3}'"},
    )

    def __init__(self, **values: Any) -> None:
        fields = {f.name: f for f in dataclasses.fields(self)}
        for name in values:
            if name not in fields:
                raise _unknown_parameter(name)
        for name, f in fields.items():
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            setattr(self, name, values.get(name, default))
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """A misspelt assignment is as much an error as a misspelt argument."""
        if name not in self.__dataclass_fields__:
            raise _unknown_parameter(name)
        is_numpy_scalar = isinstance(value, Number) and hasattr(value, "item")
        super().__setattr__(name, value.item() if is_numpy_scalar else value)

    def validate(self) -> None:
        """Check every value that is present. Raises ``InvalidRequestError`` that names the field."""
        for name in ("height", "width"):
            _check_int(name, getattr(self, name), 1, MAX_SIDE, "pixels")
        _check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS, "steps")
        _check_int("num_outputs_per_prompt", self.num_outputs_per_prompt, 1, MAX_OUTPUTS, "outputs")
        _check_int("seed", self.seed, 0, MAX_SEED, "")
        _check_int("max_sequence_length", self.max_sequence_length, 1, 1 << 20, "tokens")
        _check_int("num_frames", self.num_frames, 1, 1 << 16, "frames")
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale"):
            _check_float(name, getattr(self, name), 0.0, 1000.0)
        _check_float("fps", self.fps, 0.01, 1000.0)
        _check_schedule("sigmas", self.sigmas, 1.0)
        _check_schedule("timesteps", self.timesteps, 1000.0)
        _check_type("latents", self.latents, torch.Tensor)
        _check_type("generator", self.generator, torch.Generator)
        _check_type("extra_args", self.extra_args, dict)
        if self.output_type is not None and self.output_type not in OUTPUT_TYPES:
            raise InvalidRequestError(
                f"output_type={self.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}", param="output_type"
            )
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        for first, second in (("sigmas", "timesteps"), ("seed", "generator")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise InvalidRequestError(f"{first} and {second} exclude each other; give one of them", param=second)
        schedule = self.sigmas if self.sigmas is not None else self.timesteps
        if schedule is not None and self.num_inference_steps not in (None, len(schedule)):
            raise InvalidRequestError(
                f"num_inference_steps={self.num_inference_steps} does not match the {len(schedule)} given noise"
                " levels; leave it out or make them equal",
                param="num_inference_steps",
            )


def _unknown_parameter(name: str) -> InvalidRequestError:
    fields = dataclasses.fields(OmniDiffusionSamplingParams)
    on_command_line = {alias.lstrip("-"): f.name for f in fields for alias in f.metadata.get("aliases", ())}
    advice = nearest_name(on_command_line.get(name, name), [f.name for f in fields])
    return InvalidRequestError(f"unknown sampling parameter {name!r}; {advice}", param=name)


def normalize_prompt(prompt: Any) -> OmniPrompt:
    """A prompt as a dict of known keys with sound types. Raises ``InvalidRequestError`` that names the key."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise InvalidRequestError(
            f"a prompt must be a string or a dict with the keys {', '.join(_PROMPT_KEYS)}, not {type(prompt).__name__}",
            param="prompt",
        )
    for key in prompt:
        if key not in _PROMPT_KEYS:
            raise InvalidRequestError(f"unknown prompt key {key!r}; {nearest_name(str(key), _PROMPT_KEYS)}", param=key)
    present: dict[str, Any] = {key: value for key, value in prompt.items() if value is not None}
    for key in ("prompt", "negative_prompt"):
        _check_type(key, present.get(key), str)
        _check_text(key, present.get(key))
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        _check_embeds(key, present.get(key))
    for key in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        _check_pooled_embeds(key, present.get(key))
    _check_type("multi_modal_data", present.get("multi_modal_data"), dict)
    for text, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
        if text in present and embeds in present:
            raise InvalidRequestError(f"{text} and {embeds} exclude each other; give one of them", param=embeds)
    if "prompt" not in present and "prompt_embeds" not in present:
        raise InvalidRequestError("the prompt is missing: give 'prompt' or 'prompt_embeds'", param="prompt")
    normalized: OmniPrompt = present  # type: ignore[assignment]  # the keys were checked above
    return normalized


def _check_int(name: str, value: Any, low: int, high: int, unit: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name}={value!r} must be an integer", param=name)
    if not low <= value <= high:
        raise InvalidRequestError(f"{name}={value} must lie between {low} and {high} {unit}".rstrip(), param=name)


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name}={value!r} must be a number", param=name)
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequestError(f"{name}={value} must be a number between {low:g} and {high:g}", param=name)


def _check_schedule(name: str, values: Any, high: float) -> None:
    if values is None:
        return
    if isinstance(values, (str, bytes)) or (not isinstance(values, Sequence) and not hasattr(values, "tolist")):
        raise InvalidRequestError(f"{name}={values!r} must be a sequence of numbers", param=name)
    numbers = values.tolist() if hasattr(values, "tolist") else list(values)
    if not 1 <= len(numbers) <= MAX_STEPS:
        raise InvalidRequestError(f"{name} must hold between 1 and {MAX_STEPS} numbers, not {len(numbers)}", param=name)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= high:
            raise InvalidRequestError(f"{name} holds {number!r}; each must be a number in (0, {high:g}]", param=name)
    if any(later >= earlier for earlier, later in itertools.pairwise(numbers)):
        raise InvalidRequestError(f"{name} must decrease from each step to the next, got {numbers}", param=name)


def _check_type(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise InvalidRequestError(f"{name} must be a {kind.__name__}, not {type(value).__name__}", param=name)


def _check_text(name: str, text: str | None) -> None:
    if text is None:
        return
    if len(text) > MAX_PROMPT_LENGTH:
        raise InvalidRequestError(
            f"{name} has {len(text)} characters; at most {MAX_PROMPT_LENGTH} are taken, so shorten it", param=name
        )
    # Half of a surrogate pair, which JSON can carry, is no character: no tokenizer takes it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequestError(f"{name} holds half of a surrogate pair; give valid Unicode", param=name)


def _check_embeds(name: str, value: Any) -> None:
    _check_type(name, value, torch.Tensor)
    if value is None:
        return
    if value.dim() not in (2, 3) or (value.dim() == 3 and value.shape[0] != 1):
        raise InvalidRequestError(
            f"{name} has shape {list(value.shape)}; it must be [L, D] or [1, L, D]: one prompt without padding",
            param=name,
        )
    if value.shape[-2] == 0 or not value.is_floating_point():
        raise InvalidRequestError(
            f"{name} has shape {list(value.shape)} and dtype {value.dtype}; it must hold at least one token of floats",
            param=name,
        )
    _check_finite(name, value)


def _check_pooled_embeds(name: str, value: Any) -> None:
    _check_type(name, value, torch.Tensor)
    if value is None:
        return
    if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[0] != 1) or not value.is_floating_point():
        raise InvalidRequestError(
            f"{name} has shape {list(value.shape)} and dtype {value.dtype}; it must be floats of shape [D] or [1, D]:"
            " one vector for the whole prompt",
            param=name,
        )
    _check_finite(name, value)


def _check_finite(name: str, value: torch.Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise InvalidRequestError(f"{name} holds NaN or infinite values; all must be finite", param=name)
