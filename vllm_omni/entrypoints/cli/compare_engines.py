"""The engines that ``vllm-omni compare`` sets side by side, and how each is asked for the same work."""

from __future__ import annotations

import importlib
import inspect
import io
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.engine.admission import Door
from vllm_omni.diffusion.model_loader.components import no_progress_bar
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import ComparisonError, InvalidConfigError, InvalidRequestError, nearest_name
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

# What diffusers calls otherwise: a pipeline has one of them.
_OTHER_NAMES = {"num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt")}
# The seed travels as generators, outputs are always pictures, and fps is the speed at which a video is shown.
_NOT_PASSED = ("seed", "generator", "output_type", "fps", "extra_args")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What each engine does. ``model`` is a folder, pictures are encoded bytes; it can be pickled."""

    model: str
    prompts: tuple[OmniPrompt, ...]
    params: OmniDiffusionSamplingParams
    options: Mapping[str, Any]
    num_warmup: int
    num_trials: int
    compile_reference: bool = False
    reference_attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One prompt with every default resolved: texts by key, and sampling parameters by name."""

    texts: Mapping[str, str]
    images: tuple[bytes, ...]
    parameters: Mapping[str, Any]
    seeds: tuple[int, ...]


def resolved_calls(config: OmniDiffusionConfig, workload: Workload) -> list[Call]:
    """A call for each prompt, before anything is loaded. Raises ``InvalidRequestError`` for what either cannot do."""
    door, pipeline_class = Door(config), reference_class(config.model_class_name)
    calls = []
    for prompt in workload.prompts:
        request = door.admit(prompt, workload.params)
        given: Mapping[str, Any] = request.prompt
        assert request.seeds is not None, "the command line gives every request a seed"
        call = Call(
            texts={key: given[key] for key in ("prompt", "negative_prompt") if key in given},
            images=tuple(prompt.get("multi_modal_data", {}).get("image", ())),
            parameters={name: value for name, value in vars(request.sampling_params).items() if value is not None},
            seeds=tuple(request.seeds),
        )
        diffusers_arguments(pipeline_class, call)
        calls.append(call)
    return calls


class ComparedEngine(Protocol):
    """A loaded model."""

    load_s: float
    peak_memory_bytes: int  # as far as the engine tells; its ranks may be other processes

    def generate(self, index: int) -> list[list[Image.Image]]:
        """Pictures of prompt ``index``: one list of frames or layers per output, with one entry for a picture."""
        ...

    def facts(self) -> dict[str, str]:
        """What ran, in words, by topic."""
        ...


class VllmOmniEngine:
    """This package."""

    def __init__(self, workload: Workload) -> None:
        started = time.perf_counter()
        self._omni = Omni(workload.model, show_progress=False, **workload.options)
        self.load_s = time.perf_counter() - started
        self._prompts, self._params = workload.prompts, workload.params
        self.peak_memory_bytes = 0
        self._facts: dict[str, str] = {}

    def generate(self, index: int) -> list[list[Image.Image]]:
        (output,) = self._omni.generate(self._prompts[index], self._params)
        receipt = output.receipt
        assert receipt is not None, "a finished request has a receipt"
        self.peak_memory_bytes = max(self.peak_memory_bytes, output.metrics.peak_memory_bytes)
        self._facts = {
            "attention": ", ".join(receipt.attention_backends),
            "guidance": receipt.guidance,
            "accelerations": ", ".join(receipt.accelerations) or "none",
        }
        return _as_frames(output.images)

    def facts(self) -> dict[str, str]:
        return self._facts


class DiffusersEngine:
    """The pipeline that ``model_index.json`` names, as diffusers runs it."""

    peak_memory_bytes = 0

    def __init__(self, config: OmniDiffusionConfig, workload: Workload, calls: Sequence[Call]) -> None:
        pipeline_class = reference_class(config.model_class_name)
        self._arguments = [diffusers_arguments(pipeline_class, call) for call in calls]
        self._seeds = [call.seeds for call in calls]
        started = time.perf_counter()
        self._pipeline = _load_reference(config)
        self.load_s = time.perf_counter() - started
        self._pipeline.set_progress_bar_config(disable=True)
        if getattr(self._pipeline, "vae_scale_factor_temporal", None) == 1:
            # Where nothing is packed along time, diffusers "rounds" a number of frames up to the next.
            for arguments in self._arguments:
                arguments["num_frames"] -= 1
        self._attention = workload.reference_attention
        self._is_compiled = workload.compile_reference
        self._accelerate()

    def generate(self, index: int) -> list[list[Image.Image]]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self._seeds[index]]
        try:
            output = self._pipeline(**self._arguments[index], generator=generators, output_type="pil")
        except Exception as error:
            raise ComparisonError(f"diffusers failed: {type(error).__name__}: {error}") from error
        return _as_frames(output.frames if hasattr(output, "frames") else output.images)

    def facts(self) -> dict[str, str]:
        return {
            "attention": self._attention or "diffusers' default",
            "accelerations": "compile_repeated_blocks" if self._is_compiled else "none",
        }

    def _accelerate(self) -> None:
        names = [name for name in self._pipeline.components if name.startswith("transformer")]
        for transformer in (getattr(self._pipeline, name) for name in names):
            if transformer is None:
                continue
            try:
                if self._attention is not None:
                    transformer.set_attention_backend(self._attention)
                if self._is_compiled:
                    transformer.compile_repeated_blocks(fullgraph=True)
            except Exception as error:
                raise ComparisonError(f"diffusers cannot run {type(transformer).__name__} so: {error}") from error


def reference_class(class_name: str) -> type[Any]:
    """diffusers' pipeline class of that name. Raises ``ComparisonError`` if it has none."""
    diffusers = importlib.import_module("diffusers")
    found = getattr(diffusers, class_name, None)
    if not isinstance(found, type):
        raise ComparisonError(
            f"diffusers {diffusers.__version__} has no pipeline class {class_name}, which model_index.json names, so"
            " there is nothing to compare with; install a newer diffusers, or compare another model"
        )
    return found


def check_reference_attention(name: str | None) -> None:
    """Raises ``InvalidConfigError`` for an attention backend that diffusers does not know."""
    if name is None:
        return
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")
    allowed = {backend.value for backend in dispatch.AttentionBackendName}
    if name not in allowed:
        raise InvalidConfigError(
            f"reference_attention={name!r} is no attention backend of diffusers; {nearest_name(name, allowed)}",
            option="reference_attention",
        )


def check_parameters(pipeline_class: type[Any], prompts: Sequence[OmniPrompt], given: Mapping[str, Any]) -> None:
    """Raises ``InvalidRequestError`` for a parameter that diffusers' pipeline does not take, before anything loads."""
    accepted = inspect.signature(pipeline_class.__call__).parameters
    for prompt in prompts:
        for key in ("prompt", "negative_prompt"):
            if key in prompt:
                _diffusers_name(pipeline_class, accepted, key)
        if "multi_modal_data" in prompt:
            _diffusers_name(pipeline_class, accepted, "image")
    for name in given:
        if name not in _NOT_PASSED or name == "extra_args":
            _diffusers_name(pipeline_class, accepted, name)


def diffusers_arguments(pipeline_class: type[Any], call: Call) -> dict[str, Any]:
    """The keyword arguments that ask diffusers for the same. Raises ``InvalidRequestError`` for what it cannot."""
    accepted = inspect.signature(pipeline_class.__call__).parameters
    asked: dict[str, Any] = {**call.texts}
    asked |= {name: value for name, value in call.parameters.items() if name not in _NOT_PASSED}
    if call.images:
        opened = [Image.open(io.BytesIO(picture)) for picture in call.images]
        pictures = [picture if picture.mode == "RGBA" else picture.convert("RGB") for picture in opened]
        asked["image"] = pictures[0] if len(pictures) == 1 else pictures
    if asked.get("num_outputs_per_prompt") == 1:
        del asked["num_outputs_per_prompt"]
    arguments = {_diffusers_name(pipeline_class, accepted, name): value for name, value in asked.items()}
    if "max_area" in accepted and "height" in asked:
        # Such a pipeline scales every size to this area.
        arguments["max_area"] = asked["height"] * asked["width"]
    return arguments


def _diffusers_name(pipeline_class: type[Any], accepted: Mapping[str, Any], name: str) -> str:
    for candidate in _OTHER_NAMES.get(name, (name,)):
        if candidate in accepted:
            return candidate
    raise InvalidRequestError(
        f"{name}: diffusers' {pipeline_class.__name__} has no such parameter, so both engines cannot be given the same"
        " work; leave it out, or compare another model",
        param=name,
    )


def _load_reference(config: OmniDiffusionConfig) -> Any:
    diffusers = importlib.import_module("diffusers")
    try:
        with warnings.catch_warnings(), no_progress_bar():
            # torch_dtype is the name that every release knows; the newest ones want another.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(config.model, torch_dtype=config.torch_dtype)
        return pipeline.to(config.torch_device)
    except Exception as error:
        raise ComparisonError(
            f"diffusers {diffusers.__version__} cannot load {config.model}: {type(error).__name__}:"
            f" {' '.join(str(error).split())}"
        ) from error


def _as_frames(images: Sequence[Any]) -> list[list[Image.Image]]:
    return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
