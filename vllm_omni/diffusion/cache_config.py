"""The options of the step caches, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from vllm_omni.errors import InvalidConfigError, nearest_name

# How many of the steps are computed whatever the change is, from most to fewest.
StepMaskPolicy = Literal["slow", "medium", "balanced", "fast", "ultra"]
StepPolicy = Literal["dynamic", "static"]

# Of TeaCache, whose distance is the expected change of the transformer's output relative to the output.
_MAX_DISTANCE = 1.0


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig:
    """TeaCache (arXiv:2411.19108): skip all blocks while the input of the first one has changed little.

    The relative changes of the modulated input, each put through a polynomial, add up until they reach
    ``rel_l1_thresh``, at most 1; then the blocks are computed. 0 computes every step. ``coefficients`` has the highest
    degree first; None takes the published ones of the model, or the change as it is.
    """

    backend: ClassVar[str] = "tea_cache"

    rel_l1_thresh: float = 0.2
    coefficients: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_threshold("rel_l1_thresh", self.rel_l1_thresh)
        if self.rel_l1_thresh > _MAX_DISTANCE:
            allowed = "at most 1: there the output would have changed by as much as it is; 0.1 to 0.8 are in use"
            raise _error("rel_l1_thresh", self.rel_l1_thresh, allowed)
        if self.coefficients is None:
            return
        if not isinstance(self.coefficients, Sequence) or not self.coefficients:
            raise _error("coefficients", self.coefficients, "a list of numbers, the highest degree first")
        if not all(_is_finite(value) for value in self.coefficients):
            raise _error("coefficients", self.coefficients, "a list of finite numbers, the highest degree first")
        object.__setattr__(self, "coefficients", tuple(float(value) for value in self.coefficients))


@dataclass(frozen=True, kw_only=True)
class CacheDiTConfig:
    """DBCache of Cache-DiT: compute the first blocks, and skip the middle ones if the first changed little.

    The first ``Fn_compute_blocks`` and the last ``Bn_compute_blocks`` are always computed. The middle ones are skipped
    if what the first blocks add differs from what they added at the last computed step by less than
    ``residual_diff_threshold``, relative. -1 is no limit.
    """

    backend: ClassVar[str] = "cache_dit"

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.12  # 0.24, vLLM-Omni's, spoils pictures of few steps
    max_warmup_steps: int = 4  # steps at the begin that are computed
    max_cached_steps: int = -1  # skipped steps of one transformer and request
    max_continuous_cached_steps: int = 3  # skipped steps in a row
    # What the middle blocks add is extrapolated along its last change (TaylorSeer, arXiv:2503.06923), not repeated.
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    scm_steps_mask_policy: StepMaskPolicy | None = None
    scm_steps_policy: StepPolicy = "dynamic"  # static skips every step that the mask allows, without a look

    def __post_init__(self) -> None:
        _check_threshold("residual_diff_threshold", self.residual_diff_threshold)
        for name, least in (
            ("Fn_compute_blocks", 1),
            ("Bn_compute_blocks", 0),
            ("max_warmup_steps", 0),
            ("max_cached_steps", -1),
            ("max_continuous_cached_steps", -1),
            ("taylorseer_order", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _error(name, value, f"an integer of at least {least}")
        if self.taylorseer_order != 1:
            raise _error("taylorseer_order", self.taylorseer_order, "1, the only order that there is")
        if not isinstance(self.enable_taylorseer, bool):
            raise _error("enable_taylorseer", self.enable_taylorseer, "True or False")
        _check_choice("scm_steps_mask_policy", self.scm_steps_mask_policy, (*get_args(StepMaskPolicy), None))
        _check_choice("scm_steps_policy", self.scm_steps_policy, get_args(StepPolicy))
        if self.scm_steps_policy == "static" and self.scm_steps_mask_policy is None:
            raise _error("scm_steps_policy", "static", "'dynamic' without a scm_steps_mask_policy")


StepCacheConfig = TeaCacheConfig | CacheDiTConfig

_CONFIGS: dict[str, type[TeaCacheConfig] | type[CacheDiTConfig]] = {
    config.backend: config for config in (TeaCacheConfig, CacheDiTConfig)
}
CACHE_BACKENDS = tuple(_CONFIGS)


def step_cache_config(backend: Any, options: Any) -> StepCacheConfig | None:
    """The checked options of a cache, or None without one. Raises ``InvalidConfigError``."""
    if backend is None:
        if options is not None:
            raise InvalidConfigError(
                f"cache_config={options!r} needs cache_backend, one of {', '.join(CACHE_BACKENDS)}",
                option="cache_config",
            )
        return None
    if not isinstance(backend, str) or backend not in _CONFIGS:
        raise InvalidConfigError(
            f"cache_backend={backend!r} must be one of {', '.join(CACHE_BACKENDS)}; a model runs with one cache",
            option="cache_backend",
        )
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise InvalidConfigError(f"cache_config={options!r} must be a dict of options", option="cache_config")
    _check_names(backend, options)
    return _CONFIGS[backend](**options)


def _check_names(backend: str, options: Mapping[str, Any]) -> None:
    allowed = _names(backend)
    for name in options:
        if name in allowed:
            continue
        for other in CACHE_BACKENDS:
            if name in _names(other):
                raise InvalidConfigError(
                    f"cache_config has {name!r}, an option of cache_backend={other!r}, beside"
                    f" cache_backend={backend!r}; a model runs with one cache",
                    option="cache_config",
                )
        raise InvalidConfigError(
            f"cache_config has an unknown key {name!r}; {nearest_name(str(name), allowed)}", option="cache_config"
        )


def _names(backend: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_CONFIGS[backend])}


def _check_threshold(name: str, value: Any) -> None:
    if not _is_finite(value) or value < 0:
        raise _error(name, value, "a number of at least 0; 0 computes every step")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise _error(name, value, f"one of {', '.join(map(repr, choices))}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _error(name: str, value: Any, allowed: str) -> InvalidConfigError:
    return InvalidConfigError(f"cache_config: {name}={value!r} must be {allowed}", option="cache_config")
