"""Which pipeline class serves which model: tables of strings, and a lookup that imports a model when it is needed.

A model in this tree adds a line to the tables. A package outside of it calls :func:`register_diffusion_model`, or
offers a function that does so under the entry-point group ``vllm_omni.diffusion_models``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec
from vllm_omni.errors import UnsupportedPipelineError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_MODELS_PACKAGE = "vllm_omni.diffusion.models"
_ENTRY_POINT_GROUP = "vllm_omni.diffusion_models"

# pipeline class as model_index.json names it -> (folder, file, class)
_DIFFUSION_MODELS: dict[str, tuple[str, str, str]] = {
    "QwenImagePipeline": ("qwen_image", "pipeline_qwen_image", "QwenImagePipeline"),
    "FluxPipeline": ("flux", "pipeline_flux", "FluxPipeline"),
    "FluxKontextPipeline": ("flux", "pipeline_flux_kontext", "FluxKontextPipeline"),
    "WanImageToVideoPipeline": ("wan2_2", "pipeline_wan2_2_i2v", "WanImageToVideoPipeline"),
    "WanPipeline": ("wan2_2", "pipeline_wan2_2", "WanPipeline"),
    "QwenImageEditPipeline": ("qwen_image", "pipeline_qwen_image_edit", "QwenImageEditPipeline"),
    "QwenImageEditPlusPipeline": ("qwen_image", "pipeline_qwen_image_edit_plus", "QwenImageEditPlusPipeline"),
    "QwenImageLayeredPipeline": ("qwen_image", "pipeline_qwen_image_layered", "QwenImageLayeredPipeline"),
}

# pipeline class -> name of a function beside it: od_config -> (request -> request)
_DIFFUSION_PRE_PROCESS_FUNCS: dict[str, str] = {
    "FluxKontextPipeline": "get_flux_kontext_pre_process_func",
    "WanImageToVideoPipeline": "get_wan_i2v_pre_process_func",
    "WanPipeline": "get_wan_pre_process_func",
    "QwenImageEditPipeline": "get_qwen_image_edit_pre_process_func",
    "QwenImageEditPlusPipeline": "get_qwen_image_edit_plus_pre_process_func",
    "QwenImageLayeredPipeline": "get_qwen_image_layered_pre_process_func",
}

# pipeline class -> name of a function beside it: od_config -> (output -> images)
_DIFFUSION_POST_PROCESS_FUNCS: dict[str, str] = {
    "QwenImagePipeline": "get_qwen_image_post_process_func",
    "FluxPipeline": "get_flux_post_process_func",
    "FluxKontextPipeline": "get_flux_kontext_post_process_func",
    "WanImageToVideoPipeline": "get_wan_i2v_post_process_func",
    "WanPipeline": "get_wan_post_process_func",
    "QwenImageEditPipeline": "get_qwen_image_edit_post_process_func",
    "QwenImageEditPlusPipeline": "get_qwen_image_edit_plus_post_process_func",
    "QwenImageLayeredPipeline": "get_qwen_image_layered_post_process_func",
}


@dataclass(frozen=True)
class DiffusionModel:
    """A registered pipeline, imported."""

    pipeline_class: type[nn.Module]
    get_pre_process_func: Callable[..., Any] | None
    get_post_process_func: Callable[..., Any] | None

    def request_spec(self, od_config: OmniDiffusionConfig) -> RequestSpec | None:
        """What requests the pipeline takes, or None if it does not say."""
        make_spec: Callable[[OmniDiffusionConfig], RequestSpec] | None = getattr(
            self.pipeline_class, "request_spec", None
        )
        return None if make_spec is None else make_spec(od_config)

    def pre_process(self, od_config: OmniDiffusionConfig) -> Callable[..., Any] | None:
        """The function from request to request that runs at the door, or None."""
        return None if self.get_pre_process_func is None else self.get_pre_process_func(od_config)

    def post_process(self, od_config: OmniDiffusionConfig) -> Callable[..., Any] | None:
        """The function from a decoded output to pictures or frames, or None."""
        return None if self.get_post_process_func is None else self.get_post_process_func(od_config)


def register_diffusion_model(
    model_class_name: str,
    target: str,
    *,
    pre_process_func: str | None = None,
    post_process_func: str | None = None,
) -> None:
    """Make a pipeline known under the class name that ``model_index.json`` gives.

    ``target`` is ``"package.module:ClassName"`` and is imported when such a model is first loaded; the two functions
    are names in the same module. Registering a name again replaces it. Raises ``ValueError`` for a malformed target.
    """
    module, separator, class_name = target.partition(":")
    if not (module and separator and class_name):
        raise ValueError(f"target={target!r} must read 'package.module:ClassName'")
    folder, _, file = module.rpartition(".")
    _DIFFUSION_MODELS[model_class_name] = (folder, file, class_name)
    for table, function in (
        (_DIFFUSION_PRE_PROCESS_FUNCS, pre_process_func),
        (_DIFFUSION_POST_PROCESS_FUNCS, post_process_func),
    ):
        table.pop(model_class_name, None)
        if function is not None:
            table[model_class_name] = function


@dataclass(frozen=True)
class RegistryEntry:
    """All that the tables say of one pipeline: what another process needs to find it."""

    model_class_name: str
    target: tuple[str, str, str]
    pre_process_func: str | None
    post_process_func: str | None


def registry_entry(model_class_name: str) -> RegistryEntry:
    """The entry of a registered pipeline."""
    return RegistryEntry(
        model_class_name,
        _DIFFUSION_MODELS[model_class_name],
        _DIFFUSION_PRE_PROCESS_FUNCS.get(model_class_name),
        _DIFFUSION_POST_PROCESS_FUNCS.get(model_class_name),
    )


def restore_registry_entry(entry: RegistryEntry) -> None:
    """Make a pipeline known as another process knows it: it may have been registered by that process alone."""
    _load_entry_points()
    _DIFFUSION_MODELS[entry.model_class_name] = entry.target
    for table, function in (
        (_DIFFUSION_PRE_PROCESS_FUNCS, entry.pre_process_func),
        (_DIFFUSION_POST_PROCESS_FUNCS, entry.post_process_func),
    ):
        if function is not None:
            table[entry.model_class_name] = function


def supported_pipelines() -> list[str]:
    """The class names of all registered pipelines."""
    _load_entry_points()
    return sorted(_DIFFUSION_MODELS)


def resolve_diffusion_model(model_class_name: str) -> DiffusionModel:
    """Import a registered pipeline.

    Raises ``UnsupportedPipelineError`` for a name that is not registered, or not with what can be imported.
    """
    _load_entry_points()
    if model_class_name not in _DIFFUSION_MODELS:
        raise UnsupportedPipelineError(
            f"no model is registered for the pipeline class {model_class_name!r};"
            f" registered: {', '.join(sorted(_DIFFUSION_MODELS))}. docs/adding_a_model.md says how to add one, in"
            " this tree or by vllm_omni.diffusion.registry.register_diffusion_model from another package"
        )
    folder, file, class_name = _DIFFUSION_MODELS[model_class_name]
    name = _module_name(folder, file)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedPipelineError(
            f"{model_class_name} is registered as '{name}:{class_name}', which cannot be imported: {error}"
        ) from error
    pre_process_func = _DIFFUSION_PRE_PROCESS_FUNCS.get(model_class_name)
    post_process_func = _DIFFUSION_POST_PROCESS_FUNCS.get(model_class_name)
    missing = [n for n in (class_name, pre_process_func, post_process_func) if n is not None and not hasattr(module, n)]
    if missing:
        raise UnsupportedPipelineError(
            f"{model_class_name} is registered with {', '.join(missing)}, which {name} does not have"
        )
    return DiffusionModel(
        pipeline_class=getattr(module, class_name),
        get_pre_process_func=None if pre_process_func is None else getattr(module, pre_process_func),
        get_post_process_func=None if post_process_func is None else getattr(module, post_process_func),
    )


def _module_name(folder: str, file: str) -> str:
    """Entries of this tree name a folder of its models package; registered ones name any package, or none."""
    if not folder:
        return file
    local = f"{_MODELS_PACKAGE}.{folder}"
    if "." not in folder and importlib.util.find_spec(local) is not None:
        return f"{local}.{file}"
    return f"{folder}.{file}"


@functools.cache
def _load_entry_points() -> None:
    """Let installed packages register their models, once per process. A broken one is reported and left out."""
    for entry in entry_points(group=_ENTRY_POINT_GROUP):
        try:
            entry.load()()
        except Exception:
            logger.exception("entry point %s of %s failed; its models are not available", entry.name, entry.group)
