"""Flow matching (arXiv:2210.02747): noise levels, their shift, and the Euler step.

A noise level ``sigma`` lies in [0, 1]: 1 is pure noise, 0 the sample. A timestep is ``1000 * sigma``.
Latents follow ``x = (1 - sigma) * sample + sigma * noise``, and a model predicts ``noise - sample``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidModelFolderError

NUM_TRAIN_TIMESTEPS = 1000
EULER = "FlowMatchEulerDiscreteScheduler"

# Variants of the schedule that would change the result if they were passed over.
_UNSUPPORTED_FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
_NUMBERS = ("shift", "flow_shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def euler_config(od_config: OmniDiffusionConfig) -> Mapping[str, Any]:
    """A checkpoint's ``scheduler_config.json``, for a model that knows Euler steps alone.

    Raises ``InvalidModelFolderError`` for another scheduler, or for a variant of this one that is not supported.
    """
    config = od_config.component_config("scheduler", "scheduler_config.json")
    if config.get("_class_name", EULER) != EULER:
        raise InvalidModelFolderError(
            f"scheduler_config.json names {config['_class_name']!r}; {od_config.model_class_name} runs with {EULER}"
        )
    check_numbers(config)
    shifted_sigmas([1.0], 1.0, config)
    return config


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises ``InvalidModelFolderError`` for a shift, or what makes one, that is no positive number."""
    for name in _NUMBERS:
        value = config.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InvalidModelFolderError(f"scheduler_config.json: {name}={value!r} must be a positive number")


def resolution_shift(num_tokens: int, config: Mapping[str, Any]) -> float:
    """``mu`` of the dynamic shift: linear in the number of image tokens, through two points of the configuration."""
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(base_shift + slope * (num_tokens - base_tokens))


def shifted_sigmas(sigmas: Sequence[float], mu: float | None, config: Mapping[str, Any]) -> np.ndarray:
    """The noise levels of a run, ``[T] -> [T]`` in float32, by a ``FlowMatchEulerDiscreteScheduler`` configuration.

    ``mu`` is the shift of a configuration with ``use_dynamic_shifting`` (arXiv:2403.03206, section 5.3.2);
    else its constant ``shift`` is used. Raises ``InvalidModelFolderError`` for a variant that is not supported.
    """
    for flag in _UNSUPPORTED_FLAGS:
        if config.get(flag):
            raise InvalidModelFolderError(f"scheduler_config.json sets {flag}, which is not supported")
    levels: Any = np.asarray(sigmas, dtype=np.float32)
    if config.get("use_dynamic_shifting"):
        assert mu is not None, "a dynamic shift needs mu"
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise InvalidModelFolderError(f"scheduler_config.json: time_shift_type={kind!r} is not supported")
        factor = math.exp(mu) if kind == "exponential" else mu
        levels = factor / (factor + (1 / levels - 1))
    else:
        shift = config.get("shift", 1.0)
        levels = shift * levels / (1 + (shift - 1) * levels)
    terminal = config.get("shift_terminal")
    if terminal:
        # Stretch so that the last level is shift_terminal and the first stays where it is.
        remaining = 1 - levels
        levels = 1 - remaining * ((1 - terminal) / remaining[-1]) if remaining[-1] else levels
    return levels.astype(np.float32)


def request_sigmas(request: OmniDiffusionRequest, mu: float | None, config: Mapping[str, Any]) -> torch.Tensor:
    """Noise levels of a request, ``[num_steps + 1]`` in float32 on the CPU, the last one 0.

    Given ``sigmas`` go through the model's shift, given ``timesteps`` are used as they are.
    """
    params = request.sampling_params
    if params.timesteps is not None:
        levels = np.asarray(params.timesteps, dtype=np.float32) / NUM_TRAIN_TIMESTEPS
    elif params.sigmas is not None:
        levels = shifted_sigmas(params.sigmas, mu, config)
    else:
        num_steps = params.num_inference_steps
        assert num_steps is not None, "admission resolves num_inference_steps"
        levels = shifted_sigmas(np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu, config)
    return torch.cat([torch.from_numpy(np.ascontiguousarray(levels)), torch.zeros(1)])


@dataclass(frozen=True)
class FlowMatchEuler:
    """One Euler step along the predicted velocity. It keeps no history."""

    def coefficients(self, sigmas: torch.Tensor) -> torch.Tensor:
        """``sigmas [T + 1] -> [T, 1]``: the width of each step."""
        return (sigmas[1:] - sigmas[:-1]).unsqueeze(1)

    def initial_history(self, latents: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {}

    def step(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        coefficients: torch.Tensor,
        history: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """``latents [B, ...], prediction [B, ...], coefficients [B, 1, 1, ...] -> latents [B, ...]`` in float32."""
        return torch.addcmul(latents, coefficients[:, 0], prediction), history
