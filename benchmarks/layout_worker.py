"""What ``parallel.py`` runs on each rank: it loads a full-size model in one layout, and measures its steps."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kernel_profile import kernel_spans, overlap, profile_lines
from benchmarks.report import environment
from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.diffusion.distributed.groups import build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.worker import Worker

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2},
    "ulysses2": {"ulysses_degree": 2},
    "cfg2": {"cfg_parallel_size": 2},
    "ring2": {"ring_degree": 2},
    "hsdp2": {"use_hsdp": True, "hsdp_shard_size": 2},
}
MODELS = {"flux.1-dev": 512, "qwen-image": 128}  # text tokens
_WARM_UP_STEPS = 3  # the first one compiles, and the third one captures

_held: dict[str, Any] = {}  # the worker of this process and its configuration


def begin(folder: str, device_type: str, options: dict[str, Any], layout_name: str, nccl: bool) -> dict[str, Any]:
    """Load the model in a layout; with ``nccl``, ranks leave each other's memory alone."""
    started = time.perf_counter()
    os.environ["VLLM_OMNI_PEER_MEMORY"] = str(int(not nccl))
    device = f"cuda:{dist.get_rank()}" if device_type == "cuda" else device_type
    config = configure(folder, {"device": device, "load_format": "dummy", **options, **LAYOUTS[layout_name]})
    layout = ParallelLayout.from_config(config.parallel_config)
    groups = build_groups(layout, device_type, config.parallel_config.use_hsdp)
    _held.update(worker=Worker(config, groups=groups), config=config)
    if device_type == "cuda":
        torch.cuda.empty_cache()
    return {
        "load_s": round(time.perf_counter() - started, 1),
        "peers": bool(groups.describe()),
        "environment": environment(torch.device(device)),
    }


def measure(model: str, size: int, guided: bool, steps: int, trials: int) -> dict[str, Any]:
    """Seconds of a step on this rank, the best trial, and the most memory that it held meanwhile."""
    started = time.perf_counter()
    _generate(request(model, size, _WARM_UP_STEPS, guided))
    warmup_s = time.perf_counter() - started
    if _held["config"].torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    results = [_generate(request(model, size, steps, guided)) for _ in range(trials)]
    outputs = [result.finished["measured"] for result in results]
    return {
        "seconds_per_step": round(min(output.times.denoise_s for output in outputs) / steps, 5),
        "peak_memory_gib": round(max(output.peak_memory_bytes for output in outputs) / 2**30, 2),
        "warmup_s": round(warmup_s, 1),
        "runs": results[-1].accelerations,
    }


def profile(model: str, size: int, guided: bool) -> tuple[dict[str, float], list[str]]:
    """How one step divides into computing and communicating, and its kernels."""
    asked = request(model, size, 1, guided)
    _execute(WorkerCommand(prepare=(asked,)))
    dist.barrier(group=_cpu_group())
    spans = kernel_spans(lambda: _execute(WorkerCommand(step=("measured",))))
    _execute(WorkerCommand(release=("measured",)))
    return overlap(spans), profile_lines(spans)


def request(model: str, size: int, steps: int, guided: bool) -> OmniDiffusionRequest:
    transformer = _held["config"].tf_model_config
    generator = torch.Generator().manual_seed(0)
    width = transformer["joint_attention_dim"]
    prompt: Any = {"prompt_embeds": torch.randn(1, MODELS[model], width, generator=generator)}
    if "pooled_projection_dim" in transformer:
        prompt["pooled_prompt_embeds"] = torch.randn(1, transformer["pooled_projection_dim"], generator=generator)
    if guided:
        prompt["negative_prompt_embeds"] = torch.randn(1, MODELS[model], width, generator=generator)
    params = OmniDiffusionSamplingParams(
        height=size,
        width=size,
        num_inference_steps=steps,
        seed=0,
        output_type="latent",
        num_outputs_per_prompt=1,
        true_cfg_scale=4.0 if guided else 1.0,
        max_sequence_length=512,
        guidance_scale=3.5 if transformer.get("guidance_embeds") else None,
    )
    return OmniDiffusionRequest(prompts=[prompt], sampling_params=params, request_id="measured")


def _generate(asked: OmniDiffusionRequest) -> WorkerResult:
    steps = asked.sampling_params.num_inference_steps
    assert steps is not None, "request() gives it"
    _execute(WorkerCommand(prepare=(asked,)))
    for _ in range(steps):
        _execute(WorkerCommand(step=("measured",)))
    return _execute(WorkerCommand(decode=("measured",)))


def _execute(command: WorkerCommand) -> WorkerResult:
    result: WorkerResult = _held["worker"].execute(command)
    for error in result.errors.values():
        raise error
    return result


def _cpu_group() -> Any:
    """For a barrier that leaves the GPU alone."""
    if "cpu_group" not in _held:
        _held["cpu_group"] = dist.new_group(backend="gloo")
    return _held["cpu_group"]
