"""How the engine reaches its ranks: one interface, whether they live in this process or elsewhere."""

from __future__ import annotations

from typing import Protocol

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.worker import Worker


class Executor(Protocol):
    """Runs each command on all ranks and returns the result of one."""

    def execute(self, command: WorkerCommand) -> WorkerResult: ...

    def close(self) -> None: ...


class InProcessExecutor:
    """One rank, in this process."""

    def __init__(self, od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None) -> None:
        self._worker = Worker(od_config, on_load_progress)

    def execute(self, command: WorkerCommand) -> WorkerResult:
        return self._worker.execute(command)

    def close(self) -> None:
        self._worker.close()
