"""What the tests of layouts run on every rank: requests, from their prompt to their latents or pixels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.diffusion.distributed.groups import NO_GROUPS, ParallelGroups, build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout, check_layout, rank_config_device
from vllm_omni.diffusion.engine.admission import admit
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerOutput
from vllm_omni.diffusion.worker.worker import Worker
from vllm_omni.platforms.cpu import CpuPlatform

Prompt = Any


@functools.cache
def groups_of(layout: ParallelLayout, device_type: str, use_hsdp: bool) -> ParallelGroups:
    return NO_GROUPS if layout.world_size == 1 else build_groups(layout, device_type, use_hsdp)


def generate(
    folder: str, options: dict[str, Any], prompts: Sequence[Prompt], params: Sequence[dict[str, Any]]
) -> list[WorkerOutput]:
    """Outputs of requests that advance together, as every rank has them. FP8 runs on CPUs, too."""
    if options.get("quantization") and options.get("device", "cpu") == "cpu":
        with mock.patch.object(CpuPlatform, "why_no_fp8", return_value=None):  # torch computes it there, slowly
            return _generate(folder, options, prompts, params)
    return _generate(folder, options, prompts, params)


def _generate(
    folder: str, options: dict[str, Any], prompts: Sequence[Prompt], params: Sequence[dict[str, Any]]
) -> list[WorkerOutput]:
    config = configure(folder, options)
    groups = groups_of(check_layout(config), config.torch_device.type, config.parallel_config.use_hsdp)
    if dist.is_initialized():
        config = replace(config, device=rank_config_device(config.torch_device, dist.get_rank()))
    worker = Worker(config, groups=groups)
    model = resolve_diffusion_model(config.model_class_name)
    spec, pre_process = model.request_spec(config), model.pre_process(config)
    requests = [
        admit(prompt, OmniDiffusionSamplingParams(**values), spec, {}, pre_process)
        for prompt, values in zip(prompts, params, strict=True)
    ]
    for index, request in enumerate(requests):
        request.request_id = f"request-{index}"
    left = {request.request_id: request.sampling_params.num_inference_steps for request in requests}
    finished: dict[str, WorkerOutput] = {}
    command = WorkerCommand(prepare=tuple(requests))
    while True:
        result = worker.execute(command)
        for error in result.errors.values():
            raise error
        finished |= result.finished
        if len(finished) == len(requests):
            worker.close()
            return [finished[request.request_id] for request in requests]
        done = tuple(key for key, steps in left.items() if steps == 0 and key not in finished)
        stepped = tuple(key for key, steps in left.items() if steps)
        for key in stepped:
            left[key] -= 1
        command = WorkerCommand(decode=done, step=stepped, max_batch_size=4)


def largest_difference(ours: Sequence[WorkerOutput], reference: Sequence[WorkerOutput]) -> float:
    differences = []
    for mine, other in zip(ours, reference, strict=True):
        assert mine.output.shape == other.output.shape
        assert torch.isfinite(mine.output).all()
        assert other.output.std() > 0.05, "a constant output proves nothing"
        differences.append((mine.output - other.output).abs().max().item())
    return max(differences)


def distance_in_fp8(quantized: Sequence[WorkerOutput], exact: Sequence[WorkerOutput]) -> float:
    """Root mean square of the difference to full precision, relative to that. Ranks round otherwise than one does."""
    difference, whole = (
        torch.cat([pick(one, other).flatten() for one, other in zip(quantized, exact, strict=True)])
        for pick in (lambda one, other: one.output - other.output, lambda one, other: other.output)
    )
    distance = (difference.norm() / whole.norm()).item()
    assert distance > 1e-4, "nothing was quantized"
    return distance
