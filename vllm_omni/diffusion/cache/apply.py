"""Put a step cache before the transformers of a pipeline, which stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_omni.diffusion.cache.dbcache import DBCache
from vllm_omni.diffusion.cache.extractors import EXTRACTOR_REGISTRY, Extractor, published_coefficients
from vllm_omni.diffusion.cache.reuse import StepCache
from vllm_omni.diffusion.cache.teacache import TeaCache
from vllm_omni.diffusion.cache_config import CacheDiTConfig, TeaCacheConfig
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.step_memory import current_forward_rows
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_IDENTITY = (1.0, 0.0)  # the change as it is


class CachedForward:
    """Stands in for the forward of one transformer. Outside of a denoising step it is that forward."""

    def __init__(self, component: str, transformer: nn.Module, extractor: Extractor, cache: StepCache) -> None:
        self._component = component
        self._transformer = transformer
        self._forward = transformer.forward
        self._extractor = extractor
        self._cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = current_forward_rows()
        if rows is None:
            output: torch.Tensor = self._forward(*args, **kwargs)
            return output
        stages = self._extractor(self._transformer, *args, **kwargs)
        num_rows = stages.streams[0].shape[0]
        assert num_rows == len(rows), f"{self._component} runs {num_rows} rows in a forward of {len(rows)}"
        return self._cache.run(stages, rows, self._component)


def check_cache(od_config: OmniDiffusionConfig, *, is_stepped: bool) -> None:
    """Refuse a cache for a model that cannot have it, before anything is loaded: ``FeatureNotAvailableError``."""
    backend = od_config.cache.cache_backend
    if backend is None:
        return
    if not is_stepped:
        raise FeatureNotAvailableError(
            f"cache_backend={backend!r}: {od_config.model_class_name} runs in one piece, and a step cache needs its"
            " steps (prepare, predict, decode); leave the option out"
        )
    require_extractors(od_config, f"cache_backend={backend!r}")


def require_extractors(od_config: OmniDiffusionConfig, asked_for: str) -> None:
    """Raises ``FeatureNotAvailableError`` unless all transformers of the model can be taken apart."""
    name = od_config.model_class_name
    transformers = cached_transformers(od_config)
    if not transformers:
        raise FeatureNotAvailableError(f"{asked_for}: {name} has no transformer; leave the option out")
    for component, class_name in transformers.items():
        if class_name not in EXTRACTOR_REGISTRY:
            raise FeatureNotAvailableError(
                f"{asked_for}: {component} of {name} is a {class_name}, which has no extractor (there are those of"
                f" {', '.join(sorted(EXTRACTOR_REGISTRY))}); leave the option out, or add one by"
                " vllm_omni.diffusion.cache.register_extractor"
            )


def apply_cache(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> None:
    """Put the configured cache, if any, before the transformers of a loaded pipeline.

    Raises ``InvalidConfigError`` for options that the transformer's number of blocks does not allow, and
    ``FeatureNotAvailableError`` if it does not say what its blocks are.
    """
    config = od_config.cache.step_cache
    if config is None:
        return
    for component, class_name in cached_transformers(od_config).items():
        if isinstance(config, TeaCacheConfig):
            put_before(pipeline, component, class_name, _teacache(config, od_config, component, class_name))
        else:
            _check_num_blocks(config, pipeline.get_submodule(component))
            put_before(pipeline, component, class_name, DBCache(config))


def put_before(pipeline: nn.Module, component: str, class_name: str, cache: StepCache) -> None:
    """Let ``cache`` run the forwards of one transformer."""
    transformer = pipeline.get_submodule(component)
    forward = CachedForward(component, transformer, EXTRACTOR_REGISTRY[class_name], cache)
    transformer.forward = forward


def cached_transformers(od_config: OmniDiffusionConfig) -> dict[str, str]:
    """Transformers of the model, as its ``model_index.json`` names them, and their class names."""
    index = od_config.component_config(".", "model_index.json")
    return {
        component: entry[1]
        for component, entry in index.items()
        if component.startswith("transformer") and isinstance(entry, list) and entry[1] is not None
    }


def _teacache(config: TeaCacheConfig, od_config: OmniDiffusionConfig, component: str, class_name: str) -> TeaCache:
    coefficients = config.coefficients
    if coefficients is None:
        num_transformers = len(cached_transformers(od_config))
        coefficients = published_coefficients(class_name, od_config.component_config(component), num_transformers)
    if coefficients is None:
        logger.warning(
            "TeaCache has no coefficients for %s of %s: changes count as they are; tools/fit_teacache.py fits them",
            component,
            od_config.model,
        )
        coefficients = _IDENTITY
    return TeaCache(threshold=config.rel_l1_thresh, coefficients=coefficients)


def _check_num_blocks(config: CacheDiTConfig, transformer: nn.Module) -> None:
    """At least one block must be left to skip."""
    names = getattr(type(transformer), "_repeated_blocks", ())
    if not names:
        raise FeatureNotAvailableError(
            f"cache_backend='cache_dit': {type(transformer).__name__} names its blocks in no _repeated_blocks, by which"
            " they are counted; name them, or leave the option out"
        )
    num_blocks = sum(type(module).__name__ in names for module in transformer.modules())
    num_computed = config.Fn_compute_blocks + config.Bn_compute_blocks
    if num_computed >= num_blocks:
        raise InvalidConfigError(
            f"cache_config: Fn_compute_blocks={config.Fn_compute_blocks} and"
            f" Bn_compute_blocks={config.Bn_compute_blocks} leave none of the {num_blocks} blocks of"
            f" {type(transformer).__name__} (its _repeated_blocks) to skip; lower them",
            option="cache_config",
        )
