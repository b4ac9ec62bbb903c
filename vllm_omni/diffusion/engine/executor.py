"""How the engine reaches its ranks: one interface, whether they live in this process or elsewhere."""

from __future__ import annotations

from typing import Protocol

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoise import is_stepped
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.layout import ParallelLayout, check_layout
from vllm_omni.diffusion.engine.mp_executor import MultiprocessExecutor
from vllm_omni.diffusion.engine.replicas import ReplicatedExecutor
from vllm_omni.diffusion.engine.torchrun_executor import TorchrunExecutor
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.worker import Worker
from vllm_omni.errors import FeatureNotAvailableError


class Executor(Protocol):
    """Runs each command on all ranks and returns the result of one.

    ``is_alive`` is False once it will run no more. ``num_ready`` are the replicas that would begin a command at once: 0
    while all start again.
    """

    @property
    def is_alive(self) -> bool: ...

    @property
    def num_ready(self) -> int: ...

    def execute(self, command: WorkerCommand) -> WorkerResult: ...

    def close(self) -> None: ...


class InProcessExecutor:
    """One rank, in this process."""

    def __init__(self, od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None) -> None:
        self._worker = Worker(od_config, on_load_progress)
        self.is_alive, self.num_ready = True, 1

    def execute(self, command: WorkerCommand) -> WorkerResult:
        try:
            result = self._worker.execute(command)
        except Exception:
            self._look_at_device()
            raise
        if result.errors:
            self._look_at_device()
        return result

    def _look_at_device(self) -> None:
        """After some errors a GPU computes nothing more for this process."""
        if not self._worker.is_usable():
            self.is_alive, self.num_ready = False, 0

    def close(self) -> None:
        self._worker.close()


def make_executor(od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None) -> Executor:
    """The executor for the ranks that the configuration asks for.

    Raises ``InvalidConfigError`` or ``FeatureNotAvailableError`` for a layout that cannot be.
    """
    layout = check_layout(od_config)
    _check_pipeline(od_config, layout)
    if layout.is_in_torchrun:
        return TorchrunExecutor(od_config, layout, on_load_progress)
    if layout.data > 1:
        return ReplicatedExecutor(od_config, layout, on_load_progress)
    if layout.world_size > 1 or od_config.parallel_config.distributed_executor_backend == "ray":
        return MultiprocessExecutor(od_config, layout, on_load_progress)
    return InProcessExecutor(od_config, on_load_progress)


def _check_pipeline(od_config: OmniDiffusionConfig, layout: ParallelLayout) -> None:
    """A pipeline that runs in one piece splits its branches itself, by a mixin, or not at all."""
    pipeline_class = resolve_diffusion_model(od_config.model_class_name).pipeline_class
    if layout.cfg > 1 and not is_stepped(pipeline_class) and not issubclass(pipeline_class, CFGParallelMixin):
        raise FeatureNotAvailableError(
            f"cfg_parallel_size={layout.cfg}: {pipeline_class.__name__} runs in one piece and does not inherit"
            " CFGParallelMixin, so nothing splits its branches; leave the option out"
        )
