"""The noise levels and the sampler of a flow model, by the scheduler class that its checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.denoise import Sampler
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import (
    EULER,
    NUM_TRAIN_TIMESTEPS,
    FlowMatchEuler,
    check_numbers,
    request_sigmas,
    shifted_sigmas,
)
from vllm_omni.diffusion.schedulers.unipc import UniPC, check_unipc_config, unipc_schedule
from vllm_omni.errors import InvalidModelFolderError

_UNIPC = "UniPCMultistepScheduler"


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels ``[T + 1]``, the last one 0, timesteps ``[T]`` that the model is shown, on the CPU; the sampler."""

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    sampler: Sampler


def check_scheduler_config(config: Mapping[str, Any]) -> None:
    """Raises ``InvalidModelFolderError`` for a ``scheduler_config.json`` that :func:`flow_schedule` does not take."""
    class_name = config.get("_class_name")
    if class_name not in (EULER, _UNIPC):
        raise InvalidModelFolderError(f"scheduler_config.json: {class_name!r} must be {EULER} or {_UNIPC}")
    if config.get("use_dynamic_shifting"):
        raise InvalidModelFolderError(
            "scheduler_config.json sets use_dynamic_shifting, which this model has no rule for"
        )
    check_numbers(config)
    if class_name == _UNIPC:
        check_unipc_config(config)
    else:
        shifted_sigmas([1.0], None, config)


def flow_schedule(request: OmniDiffusionRequest, config: Mapping[str, Any]) -> FlowSchedule:
    """The schedule of a request by a constant shift, by a configuration that was checked."""
    if config["_class_name"] == _UNIPC:
        sigmas, timesteps = unipc_schedule(request, config)
        return FlowSchedule(sigmas, timesteps, UniPC(config.get("solver_order", 2)))
    sigmas = _euler_sigmas(request, config)
    return FlowSchedule(sigmas, sigmas[:-1] * NUM_TRAIN_TIMESTEPS, FlowMatchEuler())


def _euler_sigmas(request: OmniDiffusionRequest, config: Mapping[str, Any]) -> torch.Tensor:
    """diffusers spaces its own noise levels down to the lowest shifted one, and then shifts them all."""
    params = request.sampling_params
    if params.sigmas is not None or params.timesteps is not None:
        return request_sigmas(request, None, config)
    assert params.num_inference_steps is not None, "admission resolves num_inference_steps"
    shift = config.get("shift", 1.0)
    lowest = shift / (NUM_TRAIN_TIMESTEPS + shift - 1)
    levels = shifted_sigmas(np.linspace(1.0, lowest, params.num_inference_steps).tolist(), None, config)
    return torch.cat([torch.from_numpy(levels), torch.zeros(1)])
