"""Milliseconds of one forward of a full-size transformer with random weights, beside diffusers in the same run.

    python -m benchmarks.full_size flux --json benchmarks/results/flux_step.json
    python -m benchmarks.full_size qwen-image --profile profiles --json benchmarks/results/qwen_image_step.json
    python -m benchmarks.full_size wan --height 480 --width 832 --forwards 3

Needs a GPU with 80 GB. bfloat16, batch 1: FLUX.1-dev (4096 + 512 tokens at 1024 x 1024), Qwen-Image (4096 + 128),
Wan 2.2 A14B (one of its two experts, 81 frames). Each engine is measured in a process of its own, so that neither finds
the other's memory or compiled code. diffusers runs with ``compile_repeated_blocks(fullgraph=True)`` on each of its
attention backends that is installed; the best of them counts.

``--lock FILE`` is for several processes on one GPU: they build and compile side by side, and time one at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import clocks_while
from benchmarks.full_size_models import MODELS, FullSizeModel, Inputs
from benchmarks.kernel_profile import write_profile
from benchmarks.peer_attention import provide_flash_attention_3
from benchmarks.report import environment, median, write_json
from vllm_omni.platforms import get_platform

PEER_BACKENDS = ("_native_cudnn", "_flash_3", "native")
OUR_MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "fp8": {"enforce_eager": False, "quantization": "fp8"},
    "fp8 with attention": {"enforce_eager": False, "quantization": "fp8", "attention_dtype": "fp8"},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--engine", choices=("vllm-omni", "diffusers"), help="measure one and print JSON")
    parser.add_argument("--modes", nargs="+", default=tuple(OUR_MODES), choices=OUR_MODES)
    parser.add_argument("--peer-modes", nargs="+", default=("compiled",), choices=("eager", "compiled"))
    parser.add_argument("--peer-backends", nargs="+", default=PEER_BACKENDS, choices=PEER_BACKENDS)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="blocks of each kind, for a quick look; absent: all")
    parser.add_argument("--forwards", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only-graphs", action="store_true", help="do not time compiled modes without CUDA graphs")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--clocks", action="store_true", help="read the GPU's clock and power during further forwards")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each mode")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def config_of(model: FullSizeModel, layers: int | None) -> dict[str, Any]:
    config = model.transformer_config
    for name in ("num_layers", "num_single_layers"):
        if layers is not None and name in config:
            config[name] = layers
    return config


@torch.inference_mode()
def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_omni.diffusion.compile import apply_compile
    from vllm_omni.diffusion.cuda_graph import apply_cuda_graphs
    from vllm_omni.diffusion.modulations import PreparedModulations, prepare_modulations

    inputs = on_device(MODELS[args.model].inputs(True, args.height, args.width), args.device)
    results: dict[str, Any] = {}
    for mode in args.modes:
        with shared(args.lock):
            transformer, od_config = built(args, OUR_MODES[mode])
        compiled = apply_compile(transformer, od_config)
        forward = functools.partial(transformer, **inputs)
        if compiled is not None and not args.only_graphs:
            results[f"{mode}, no graphs"] = measured(args, f"vllm-omni-{mode}-no-graphs", forward)
        graphs = apply_cuda_graphs(transformer, od_config)
        results[mode] = measured(args, f"vllm-omni-{mode}", forward)
        prepare_modulations(transformer, od_config)
        if isinstance(getattr(transformer, "stages", None), PreparedModulations):
            name = f"{mode}, modulations prepared"
            results[name] = with_prepared_modulations(args, name, transformer, inputs)
            results[name]["saved_ms"] = results[mode]["ms"] - results[name]["ms"]
        for name in results.keys() & {mode, f"{mode}, modulations prepared"}:
            results[name]["runs"] = [] if compiled is None else [compiled.describe()]
            results[name]["runs"] += [] if graphs is None else graphs.describe()
        del transformer, compiled, graphs, forward
        torch.compiler.reset()
        gc.collect()
        get_platform(torch.device(args.device)).empty_cache()
        get_platform(torch.device(args.device)).reset_peak_memory()
    return results


def with_prepared_modulations(args: argparse.Namespace, name: str, transformer: Any, inputs: Inputs) -> dict[str, Any]:
    """A forward whose modulations are known, and the milliseconds that it costs a request to know those of its steps.

    They are divided by its steps in ``ms_with_share_of_N_steps``: what a step takes in truth.
    """
    from vllm_omni.diffusion.modulations import STEPS_AHEAD
    from vllm_omni.diffusion.step_memory import ForwardRow, StepMemory, forward_rows

    def at(step: int, num_steps: int, memory: StepMemory) -> Any:
        timesteps = torch.linspace(1000, 20, num_steps, device=args.device)
        return forward_rows([ForwardRow(memory, 0, 0, step, num_steps, timesteps)])

    with at(0, 50, StepMemory()):
        figures = measured(args, f"vllm-omni-{name}", functools.partial(transformer, **inputs))
    for num_steps in (28, 50):
        total_ms = 0.0
        for step in range(0, num_steps, STEPS_AHEAD):
            times_ms: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(4):
                memory = StepMemory()
                for is_known in (False, True):
                    with exclusive(args.lock), at(step, num_steps, memory):
                        synchronize(args.device)
                        started = time.perf_counter()
                        transformer.stages(**inputs)
                        synchronize(args.device)
                        times_ms[is_known].append(1000 * (time.perf_counter() - started))
            total_ms += median(times_ms[False]) - median(times_ms[True])
        figures[f"prepare_{num_steps}_steps_ms"] = total_ms
        figures[f"ms_with_share_of_{num_steps}_steps"] = figures["ms"] + total_ms / num_steps
    print(name, {key: round(value, 2) for key, value in figures.items()}, file=sys.stderr, flush=True)
    return figures


def built(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Any, Any]:
    """Our transformer with random weights, and its configuration."""
    from vllm_omni.diffusion.attention.fp8 import attention_dtype
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.model_loader.components import default_dtype, fill_with_random_weights
    from vllm_omni.diffusion.quantization import quantized_linears
    from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs

    model = MODELS[args.model]
    od_config = OmniDiffusionConfig.from_options(
        model=str(model.path), model_class_name=model.model_class_name, dtype="bfloat16", device=args.device, **options
    )
    model_class = model.our_class()
    kwargs = get_transformer_config_kwargs(config_of(model, args.layers), model_class)
    with (
        torch.device(args.device),
        default_dtype(torch.bfloat16),
        quantized_linears(od_config),
        attention_dtype(od_config.attention_dtype),
    ):
        transformer = model_class(od_config=od_config, **kwargs).eval()
    fill_with_random_weights(transformer)
    return transformer, od_config


@torch.inference_mode()
def measure_diffusers(args: argparse.Namespace) -> dict[str, Any]:
    provide_flash_attention_3()
    model = MODELS[args.model]
    results: dict[str, Any] = {}
    with shared(args.lock):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(args.device):
            transformer = model.diffusers_class().from_config(config_of(model, args.layers)).eval()
        torch.set_default_dtype(torch.float32)
    inputs = on_device(model.inputs(False, args.height, args.width), args.device)
    for mode in args.peer_modes:
        if mode == "compiled":
            transformer.compile_repeated_blocks(fullgraph=True)
        for backend in args.peer_backends:
            name = f"{mode} {backend}"
            try:
                transformer.set_attention_backend(backend)
                results[name] = measured(
                    args, f"diffusers-{mode}{backend}", functools.partial(transformer, **inputs, return_dict=False)
                )
            except Exception as error:
                results[name] = {"error": str(error).strip().splitlines()[0]}
            torch.compiler.reset()
    return results


def on_device(inputs: Inputs, device: str) -> Inputs:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def measured(args: argparse.Namespace, name: str, forward: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a forward on the device, and those that the host takes to queue it."""
    started = time.perf_counter()
    with shared(args.lock):
        for _ in range(2):
            forward()
        synchronize(args.device)
    first_s = time.perf_counter() - started
    with exclusive(args.lock):
        for _ in range(2):
            forward()
        synchronize(args.device)
        device_ms, host_ms = [], []
        for _ in range(args.forwards):
            started = time.perf_counter()
            forward()
            host_ms.append(1000 * (time.perf_counter() - started))
            synchronize(args.device)
            device_ms.append(1000 * (time.perf_counter() - started))
        if args.profile is not None:
            write_profile(args.profile / f"{args.model}-{name.replace(',', '').replace(' ', '-')}.txt", forward)
        clocks = clocks_while(forward, args.forwards) if args.clocks else {}
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else 0.0
    figures = {
        "ms": median(device_ms),
        "ms_min": min(device_ms),
        "host_ms": median(host_ms),
        "first_s": first_s,
        "peak_memory_gib": peak,
        **clocks,
    }
    print(name, {key: round(value, 2) for key, value in figures.items()}, file=sys.stderr, flush=True)
    return figures


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def _locked(path: Path | None, kind: int) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, kind)
        yield


def shared(path: Path | None) -> Any:
    """Work that others may do at the same time."""
    return _locked(path, fcntl.LOCK_SH)


def exclusive(path: Path | None) -> Any:
    """Work that is timed."""
    return _locked(path, fcntl.LOCK_EX)


def main() -> None:
    args = parse_args()
    if args.engine is not None:
        result = measure_ours(args) if args.engine == "vllm-omni" else measure_diffusers(args)
        print(json.dumps({"environment": environment(torch.device(args.device)), "modes": result}))
        return
    results: dict[str, Any] = {"model": args.model, "size": [args.width, args.height], "layers": args.layers}
    for engine in ("vllm-omni", "diffusers"):
        command = [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            results[engine] = {"error": f"exit status {done.returncode}"}
            continue
        measured_modes = json.loads(done.stdout.strip().splitlines()[-1])
        results["environment"], results[engine] = measured_modes["environment"], measured_modes["modes"]
    peers = [figures["ms"] for figures in results["diffusers"].values() if "ms" in figures]
    if peers:
        for mode, figures in results["vllm-omni"].items():
            if "ms" in figures:
                figures["ratio"] = figures["ms"] / min(peers)
                print(f"{mode}: {figures['ms']:.1f} ms, over the best of diffusers: {figures['ratio']:.3f}")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
