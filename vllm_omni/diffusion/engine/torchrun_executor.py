"""Ranks that ``torchrun`` has started: every process runs the same script, and each is one rank of the model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout, rank_config_device
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.worker import Worker
from vllm_omni.errors import InvalidConfigError


class TorchrunExecutor:
    """This process's rank. All processes must ask for the same generations in the same order.

    The requests of the first rank are what every rank computes: ids and seeds that were drawn differ between them. A
    seed becomes that of the first, for the receipt; an id stays, by which the engine of this process knows the request.
    """

    is_alive = True
    num_ready = 1

    def __init__(
        self, od_config: OmniDiffusionConfig, layout: ParallelLayout, on_load_progress: LoadProgress | None = None
    ) -> None:
        num_processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if layout.data > 1 or layout.world_size != num_processes:
            raise InvalidConfigError(
                f"{layout.product} needs {layout.num_ranks} ranks, torchrun started {num_processes}"
                " processes; make the product equal to --nproc-per-node x --nnodes (without data_parallel_size: start"
                " a script for each replica)",
                option="tensor_parallel_size",
            )
        device = torch.device(rank_config_device(od_config.torch_device, int(os.environ["LOCAL_RANK"])))
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.init()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        groups = build_groups(layout, device.type, od_config.parallel_config.use_hsdp)
        self._worker = Worker(
            replace(od_config, device=str(device)), on_load_progress if rank == 0 else None, groups, decodes=True
        )
        self._ids: dict[str, str] = {}  # of this process, by those of the first

    def execute(self, command: WorkerCommand) -> WorkerResult:
        agreed: list[WorkerCommand] = [command]
        dist.broadcast_object_list(agreed, src=0, device=torch.device("cpu"))
        for ours, first in zip(command.prepare, agreed[0].prepare, strict=True):
            self._ids[first.request_id] = ours.request_id
            ours.sampling_params.seed = first.sampling_params.seed
        result = self._worker.execute(agreed[0])
        gone = (*result.finished, *result.errors, *agreed[0].release)
        result.finished = {self._ids[key]: output for key, output in result.finished.items()}
        result.errors = {self._ids[key]: error for key, error in result.errors.items()}
        result.previews = {self._ids[key]: preview for key, preview in result.previews.items()}
        if result.memory is not None:
            # What fits is decided by every rank: all go by the memory of the first.
            measured = [result.memory]
            dist.broadcast_object_list(measured, src=0, device=torch.device("cpu"))
            state_bytes = {self._ids[key]: num_bytes for key, num_bytes in measured[0].state_bytes.items()}
            result.memory = replace(measured[0], state_bytes=state_bytes)
        for key in gone:
            self._ids.pop(key, None)
        return result

    def close(self) -> None:
        self._worker.close()
