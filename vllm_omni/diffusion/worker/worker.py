"""One rank: it owns a device, and runs commands on it."""

from __future__ import annotations

import contextlib
import gc

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import NO_GROUPS, ParallelGroups, parallel_groups
from vllm_omni.diffusion.distributed.utils import local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.model_runner import ModelRunner
from vllm_omni.errors import release_frames
from vllm_omni.logger import init_logger
from vllm_omni.platforms import get_platform

logger = init_logger(__name__)


class Worker:
    """Holds the model runner of one device. ``groups`` are those of this rank.

    The first rank decodes for all, unless ``decodes`` is set.
    """

    def __init__(
        self,
        od_config: OmniDiffusionConfig,
        on_load_progress: LoadProgress | None = None,
        groups: ParallelGroups = NO_GROUPS,
        *,
        decodes: bool = False,
    ) -> None:
        self._device = od_config.torch_device
        self._groups = groups
        with local_device(self._device), parallel_groups(self._groups):
            self._runner: ModelRunner | None = ModelRunner(od_config, on_load_progress, decodes=decodes)

    def execute(self, command: WorkerCommand) -> WorkerResult:
        """Carry out one command on this worker's device."""
        assert self._runner is not None, "the engine gives a closed worker no commands"
        as_written = torch.compiler.set_stance("force_eager") if command.is_trial else contextlib.nullcontext()
        with local_device(self._device), parallel_groups(self._groups), torch.inference_mode(), as_written:
            result = self._runner.execute(command)
        for error in result.errors.values():
            release_frames(error)  # those of the runner too have returned: who keeps the error keeps no weights
        return result

    def is_usable(self) -> bool:
        """Whether the device still computes. An illegal access to memory, say, ends that for the whole process."""
        try:
            get_platform(self._device).synchronize()
        except RuntimeError:
            logger.exception("%s computes no more in this process; start it anew", self._device)
            return False
        return True

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._runner = None
        gc.collect()  # modules refer to each other in circles
        get_platform(self._device).empty_cache()
