"""The engine's configuration, and what a pipeline returns.

Every option is declared once, here: its default, its help text and its check. The command line is derived from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_omni.diffusion.cache_config import CACHE_BACKENDS, StepCacheConfig, step_cache_config
from vllm_omni.diffusion.options import option as _option
from vllm_omni.diffusion.options import planned as _planned
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.start_config import StartConfig
from vllm_omni.errors import (
    FeatureNotAvailableError,
    InvalidConfigError,
    InvalidModelFolderError,
    nearest_name,
)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What a model makes -> whether it starts from a picture.
TASKS: dict[str, bool] = {
    "text-to-image": False,
    "image-edit": True,
    "image-to-layers": True,
    "text-to-video": False,
    "image-to-video": True,
}
ATTENTION_BACKENDS = ("TORCH_SDPA", "CUDNN_ATTN", "FLASH_ATTN")


@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks share the work, and how. The ranks of a model are as many as the product of the sizes."""

    tensor_parallel_size: int = _option(1, "ranks that share each layer, by heads and by features")
    cfg_parallel_size: int = _option(1, "ranks that share the branches of classifier-free guidance")
    ulysses_degree: int = _option(1, "ranks that share a sequence and exchange tokens for heads in attention (Ulysses)")
    ring_degree: int = _option(1, "ranks that share a sequence and pass on keys and values in attention (ring)")
    data_parallel_size: int = _option(1, "replicas of the model, each on its own ranks; requests go to the least busy")
    vae_parallel_size: int = _option(1, "ranks, of those that there are, that share the tiles of vae_use_tiling")
    pipeline_parallel_size: int = _option(1, "ranks that hold different blocks; above 1 it is refused, with the reason")
    use_hsdp: bool = _option(False, "let each rank hold a part of the weights and gather a block when it runs (FSDP2)")
    hsdp_shard_size: int = _option(
        1, "ranks that hold the weights with use_hsdp; those that share a sequence do so without it"
    )
    distributed_executor_backend: Literal["mp", "ray"] = _option(
        "mp",
        "how ranks are run: mp, a process each on this machine; ray, an actor each on the machines of a Ray cluster",
        choices=("mp", "ray"),
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Skipping of transformer work between similar steps."""

    cache_backend: Literal["tea_cache", "cache_dit"] | None = _option(
        None, "step cache, which skips blocks of the transformer at steps that change little", choices=CACHE_BACKENDS
    )
    cache_config: Mapping[str, Any] | None = _option(
        None, "options of the step cache as a JSON object, as in '{\"rel_l1_thresh\": 0.2}'"
    )

    def __post_init__(self) -> None:
        if isinstance(self.cache_config, Mapping):
            # A copy: what the caller does with his own must not change a configuration that was checked.
            object.__setattr__(self, "cache_config", dict(self.cache_config))
        step_cache_config(self.cache_backend, self.cache_config)

    @property
    def step_cache(self) -> StepCacheConfig | None:
        """The cache's own options, with their defaults; None without a cache."""
        return step_cache_config(self.cache_backend, self.cache_config)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is traded for memory."""

    enable_cpu_offload: bool = _planned(False, "CPU offload")
    enable_layerwise_offload: bool = _planned(False, "layerwise offload")
    vae_use_slicing: bool = _option(False, "decode the pictures of a batch one by one")
    vae_use_tiling: bool = _option(False, "decode large pictures in overlapping tiles")


# The parts of the configuration; their fields are flat options like all others.
_NESTED: dict[str, type[Any]] = {
    "parallel_config": DiffusionParallelConfig,
    "cache": CacheConfig,
    "memory": MemoryConfig,
    "start": StartConfig,
}


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionConfig:
    """Everything that is fixed when the engine starts. Built by ``engine.configure``.

    ``model`` is a local folder in the layout of a diffusers pipeline: a hub id is resolved before, as are the values
    ``"auto"`` of device and dtype.
    """

    model: str = field(metadata={"cli": False})
    model_class_name: str = field(metadata={"cli": False})
    revision: str | None = _option(None, "branch, tag or commit of a model on the hub")
    dtype: str = _option(
        "auto", "dtype of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", *DTYPES)
    )
    device: str = _option("auto", "cpu, cuda or cuda:<index>; auto: a GPU if there is one")
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "auto: read the weights; dummy: random weights of full size", choices=("auto", "dummy")
    )
    attention_backend: str | None = _option(
        None,
        "attention backend by name; absent: DIFFUSION_ATTENTION_BACKEND, else the fastest that the inputs allow",
        choices=ATTENTION_BACKENDS,
    )
    attention_dtype: Literal["fp8"] | None = _option(
        None, "fp8: self-attention in 8 bits, by FlashAttention 3; absent: in the model's dtype", choices=("fp8",)
    )
    enforce_eager: bool = _option(
        True, "run the transformer as it is written; False compiles its repeated blocks with torch.compile"
    )
    max_batch_size: int = _option(16, "most pictures that share one forward of the transformer")
    max_num_seqs: int = _option(64, "most requests that are in progress at once")
    scheduling_policy: Literal["shortest", "fair", "fcfs"] | None = _option(
        None,
        "who takes the next step: shortest remaining work first with ageing, equal time for each user, or first come;"
        " absent: shortest in a server, else fcfs",
        choices=("shortest", "fair", "fcfs"),
    )
    memory_budget_mb: int | None = _option(
        None, "most megabytes of the device for requests in progress; absent: nine tenths of what the model leaves free"
    )
    quantization: Literal["fp8"] | None = _option(
        None, "fp8: the transformer's large linear layers in 8 bits, weights and activations", choices=("fp8",)
    )
    enable_prompt_embed_cache: bool = _option(False, "keep the embeddings of prompts and reuse them for equal ones")
    prompt_embed_cache_size: int = _option(
        64,
        "most prompts whose embeddings are kept; the least recently used go",
        needs=("enable_prompt_embed_cache", True),
    )
    parallel_config: DiffusionParallelConfig = field(default_factory=DiffusionParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    start: StartConfig = field(default_factory=StartConfig)

    def __post_init__(self) -> None:
        for part in (self, self.parallel_config, self.cache, self.memory, self.start):
            for option in _plain_fields(type(part)):
                value, (other, needed) = getattr(part, option.name), option.metadata.get("needs", (None, None))
                _check_option(option, value)
                if other is not None and value != option.default and getattr(self, other) != needed:
                    raise InvalidConfigError(
                        f"{option.name}={value!r} has no effect without {other}={needed}; set it, or leave this out",
                        option=option.name,
                    )
        budget = self.memory_budget_mb
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise InvalidConfigError(
                f"memory_budget_mb={budget!r} must be an integer of at least 1", option="memory_budget_mb"
            )

    @classmethod
    def from_options(cls, *, model: str, model_class_name: str, **options: Any) -> OmniDiffusionConfig:
        """The configuration of flat options, with device and dtype already named.

        Raises ``InvalidConfigError`` for an option that is unknown or out of range, ``FeatureNotAvailableError`` for
        one whose feature does not exist yet.
        """
        check_option_names(options)
        nested: dict[str, Any] = {}
        for part, part_class in _NESTED.items():
            names = {f.name for f in dataclasses.fields(part_class)}
            nested[part] = part_class(**{name: options.pop(name) for name in names & options.keys()})
        return cls(model=model, model_class_name=model_class_name, **options, **nested)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def tf_model_config(self) -> Mapping[str, Any]:
        """The transformer's ``config.json``."""
        return self.component_config("transformer")

    def component_config(self, component: str, filename: str = "config.json") -> Mapping[str, Any]:
        """A component's JSON configuration. Raises ``InvalidModelFolderError`` if it is missing or broken."""
        config = read_json(Path(self.model) / component / filename)
        if not isinstance(config, dict):
            raise InvalidModelFolderError(f"{self.model}/{component}/{filename} must hold a JSON object")
        return config


def read_json(path: Path) -> Any:
    """A JSON file of a model folder. Raises ``InvalidModelFolderError`` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidModelFolderError(f"{path} is missing; a diffusers pipeline folder has it") from None
    except OSError as error:
        raise InvalidModelFolderError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidModelFolderError(f"{path} is not valid JSON: {error}") from error


def engine_options() -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """All flat options of the engine by name: the class that declares each, and its field."""
    options: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for config_field in dataclasses.fields(OmniDiffusionConfig):
        part = _NESTED.get(config_field.name)
        if part is not None:
            options |= {f.name: (part, f) for f in dataclasses.fields(part)}
        elif config_field.name not in ("model", "model_class_name"):
            options[config_field.name] = (OmniDiffusionConfig, config_field)
    return options


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raises ``InvalidConfigError`` for a name that no option has, with the nearest one that exists."""
    allowed = engine_options()
    for name in options:
        if name not in allowed:
            raise InvalidConfigError(f"unknown option {name!r}; {nearest_name(name, allowed)}", option=name)


def _plain_fields(config_class: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config_class) if f.name not in _NESTED]


def _check_option(option: dataclasses.Field[Any], value: Any) -> None:
    name, default = option.name, option.default
    feature = option.metadata.get("planned")
    if feature is not None:
        if value != default or type(value) is not type(default):
            raise FeatureNotAvailableError(f"{name}={value!r}: {feature} is not available yet; leave the option out")
        return
    choices = option.metadata.get("choices")
    if choices is not None and value not in choices and value != default:
        raise InvalidConfigError(f"{name}={value!r} must be one of {', '.join(choices)}", option=name)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InvalidConfigError(f"{name}={value!r} must be True or False", option=name)
    elif isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidConfigError(f"{name}={value!r} must be an integer of at least 1", option=name)


@dataclass(frozen=True)
class DiffusionOutput:
    """What a pipeline returns: pixels in [-1, 1] or samples, one row per output, or latents if asked for."""

    output: Any


@dataclass(frozen=True)
class SameAs:
    """A default that is the value of another parameter, which stands before it in ``RequestSpec.defaults``."""

    parameter: str


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What requests a pipeline takes, known before its weights are loaded.

    ``defaults`` names the parameters that depend on the model, with the value that an absent one gets, and
    ``extra_args`` those of this model alone. A request that sets another one is refused. ``check`` raises
    ``InvalidRequestError`` for what only the model knows. ``tasks`` are those of ``TASKS`` that the model can do.
    """

    defaults: Mapping[str, Any]
    tasks: tuple[str, ...] = ()
    cfg_parameters: tuple[str, ...] = ("true_cfg_scale",)  # those that are scales of classifier-free guidance
    size_multiple: int = 1  # pixels; height and width must be multiples of it
    temporal_factor: int = 1  # of a video model: num_frames is one more than a multiple of it
    output_types: tuple[str, ...] = ("pil", "np", "pt", "latent")
    prompt_keys: frozenset[str] = frozenset({"prompt"})
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[OmniDiffusionRequest], None] | None = None
