"""Seconds per step and peak memory of full-size models on two GPUs, beside one GPU in the same run.

    torchrun --nproc-per-node 2 -m benchmarks.parallel --json benchmarks/results/parallel_2x_h100.json

Random weights, bfloat16, compiled blocks, batch 1. Guidance is on where its branches are shared, and off elsewhere.
Text encoders are left small: prompts come as embeddings. Each rank measures the single GPU for itself; the slower one
counts, as it does in every layout. Results are written after each layout, so that a run may be cut short.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import environment, write_json
from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.diffusion.distributed.groups import NO_GROUPS, build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerOutput
from vllm_omni.diffusion.worker.worker import Worker

CONFIGS = Path(__file__).parent / "configs"
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "cfg2": {"cfg_parallel_size": 2},
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "hsdp2": {"use_hsdp": True, "hsdp_shard_size": 2},
    "tp2": {"tensor_parallel_size": 2},
}
_HANG_S = 150  # seconds, compilation included
MODELS = {"qwen-image": 128, "flux.1-dev": 512}  # text tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one block of two heads, to try the script out on CPUs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline-s", type=float, default=float("inf"), help="begin no layout after this time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def cut_down(folder: Path, tiny: bool) -> None:
    """Cut the text encoders of a configuration to one narrow layer and, with ``tiny``, the transformer as well."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        text = config.get("text_config", config)
        for part in (text, config.get("vision_config", {})):
            for name in ("num_hidden_layers", "depth"):
                if name in part:
                    part[name] = 1
        if path.parent.name.startswith("text_encoder"):
            text.update({"vocab_size": 1000, "intermediate_size": 64, "num_layers": 1, "d_ff": 64})
            text.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
        elif tiny:
            config.update({name: 1 for name in ("num_layers", "num_single_layers") if name in config})
            if "num_attention_heads" in config:
                config["num_attention_heads"] = 2
        path.write_text(json.dumps(config))


def request(model: str, config: Any, size: int, steps: int, guided: bool) -> OmniDiffusionRequest:
    width = config.tf_model_config["joint_attention_dim"]
    generator = torch.Generator().manual_seed(0)
    prompt: Any = {"prompt_embeds": torch.randn(1, MODELS[model], width, generator=generator)}
    if "pooled_projection_dim" in config.tf_model_config:
        prompt["pooled_prompt_embeds"] = torch.randn(1, config.tf_model_config["pooled_projection_dim"])
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
        guidance_scale=3.5 if config.tf_model_config.get("guidance_embeds") else None,
    )
    return OmniDiffusionRequest(prompts=[prompt], sampling_params=params, request_id="measured")


def run(worker: Worker, asked: OmniDiffusionRequest) -> WorkerOutput:
    steps = asked.sampling_params.num_inference_steps
    assert steps is not None
    commands = [WorkerCommand(prepare=(asked,))]
    commands += [WorkerCommand(step=(asked.request_id,))] * steps + [WorkerCommand(decode=(asked.request_id,))]
    for command in commands:
        result = worker.execute(command)
        for error in result.errors.values():
            raise error
    return result.finished[asked.request_id]


def measure(args: argparse.Namespace, model: str, folder: Path, layout_name: str, rank: int) -> dict[str, Any]:
    device = f"cuda:{rank}" if args.device == "cuda" else args.device
    options = {"device": device, "load_format": "dummy", "enforce_eager": args.eager, **LAYOUTS[layout_name]}
    if args.device == "cuda":
        options["dtype"] = "bfloat16"
    config = configure(str(folder), options)
    layout = ParallelLayout.from_config(config.parallel_config)
    groups = NO_GROUPS
    if layout.world_size > 1:
        groups = build_groups(layout, args.device, config.parallel_config.use_hsdp)
    started = time.perf_counter()
    worker = Worker(config, groups=groups)
    report: dict[str, Any] = {"load_s": round(time.perf_counter() - started, 1)}
    guidances = {"one": (False, True), "cfg2": (True,)}.get(layout_name, (False,))
    for size in args.sizes:
        for guided in guidances:
            if guided and model != "qwen-image":
                continue
            warmup_started = time.perf_counter()
            run(worker, request(model, config, size, 2, guided))
            warmup_s = time.perf_counter() - warmup_started
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            outputs = [run(worker, request(model, config, size, args.steps, guided)) for _ in range(args.trials)]
            values = torch.tensor([min(output.times.denoise_s for output in outputs) / args.steps])
            memory = torch.tensor([max(output.peak_memory_bytes for output in outputs) / 2**30])
            for tensor in (values, memory):
                dist.all_reduce(tensor, dist.ReduceOp.MAX)  # on the CPU: by gloo
            report[f"{size}{' guided' if guided else ''}"] = {
                "seconds_per_step": round(values.item(), 5),
                "peak_memory_gib": round(memory.item(), 2),
                "warmup_s": round(warmup_s, 1),
            }
    worker.close()
    del worker
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return report


def compared(results: dict[str, Any]) -> dict[str, float]:
    """Seconds of one GPU over those of each layout, and memory of HSDP over that of one GPU."""
    ratios: dict[str, float] = {}
    one = results.get("one", {})
    for layout, report in results.items():
        for case, values in report.items():
            if layout != "one" and isinstance(values, dict) and case in one:
                ratios[f"{layout} {case}"] = round(one[case]["seconds_per_step"] / values["seconds_per_step"], 3)
                if layout == "hsdp2":
                    ratio = values["peak_memory_gib"] / one[case]["peak_memory_gib"]
                    ratios[f"{layout} {case} memory"] = round(ratio, 3)
    return ratios


def main() -> None:
    args = parse_args()
    rank, started = int(os.environ["LOCAL_RANK"]), time.monotonic()
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_HANG_S))
    results: dict[str, Any] = {"environment": environment(torch.device(args.device)), "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            folder = Path(temporary) / model
            shutil.copytree(CONFIGS / model, folder)
            cut_down(folder, args.tiny)
            measured: dict[str, Any] = {}
            results["models"][model] = {"seconds": measured}
            for layout in args.layouts:
                late = torch.tensor([time.monotonic() - started > args.deadline_s])
                dist.all_reduce(late, dist.ReduceOp.MAX)
                if late.item() or (layout == "cfg2" and model != "qwen-image"):
                    continue
                faulthandler.dump_traceback_later(_HANG_S)  # says where a layout hangs
                try:
                    measured[layout] = measure(args, model, folder, layout, rank)
                except torch.OutOfMemoryError as error:
                    measured[layout] = {"error": str(error).splitlines()[0]}
                faulthandler.cancel_dump_traceback_later()
                results["models"][model]["ratios"] = compared(measured)
                if rank == 0:
                    print(
                        f"{time.monotonic() - started:.0f} s", model, layout, json.dumps(measured[layout]), flush=True
                    )
                    write_json(args.json, results)
    if rank == 0:
        print(json.dumps({name: value.get("ratios") for name, value in results["models"].items()}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # communicators of layouts that are gone have nothing left to say


if __name__ == "__main__":
    main()
