"""One rank: it owns a device, and runs commands on it."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.model_runner import ModelRunner
from vllm_omni.platforms import get_platform


class Worker:
    """Holds the model runner of one device."""

    def __init__(self, od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None) -> None:
        self._device = od_config.torch_device
        with local_device(self._device):
            self._runner: ModelRunner | None = ModelRunner(od_config, on_load_progress)

    def execute(self, command: WorkerCommand) -> WorkerResult:
        """Carry out one command on this worker's device."""
        assert self._runner is not None, "the engine gives a closed worker no commands"
        with local_device(self._device), torch.inference_mode():
            return self._runner.execute(command)

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._runner = None
        get_platform(self._device).empty_cache()
