"""Seconds from the start of the process to the first picture: cold, without compiled code on disk, and warm, with it.

    python -m benchmarks.startup --json benchmarks/results/startup.json
    python -m benchmarks.startup --full-size flux --json benchmarks/results/startup_flux.json
    python -m benchmarks.startup --weights 8

Each start is a process of its own; the cold one has an empty ``compile_cache_dir``, which the warm one finds full. The
shipped model, or FLUX.1-dev or Qwen-Image of full size with random weights made on the device. ``--weights N``
measures loading alone: N GB in shards of 1 GB, written before and thus in the page cache, onto the device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import environment, write_json

_GB = 10**9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model; absent: the shipped one")
    parser.add_argument("--full-size", choices=("flux", "qwen-image"))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for what is written; absent: a temporary one")
    parser.add_argument("--weights", type=int, metavar="GB")
    parser.add_argument("--one-start", type=float, help="time.time() of the parent: measure one start and print JSON")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def start(args: argparse.Namespace) -> dict[str, Any]:
    imported = time.time()
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    steps, prompt, options = 4, "a red circle", {}
    model = args.model
    if args.full_size is not None:
        from benchmarks import full_size_generate

        model = str(full_size_generate.folder_of(argparse.Namespace(model=args.full_size, scratch=args.scratch)))
        prompt = full_size_generate.prompt(args.full_size, 0)
        options["load_format"] = "dummy"
    with Omni(
        model,
        enforce_eager=args.eager,
        compile_cache_dir=None if args.eager else str(args.scratch / "compiled"),
        show_progress=False,
        **options,
    ) as omni:
        loaded = time.time()
        outputs = [omni.generate(prompt, OmniDiffusionSamplingParams(num_inference_steps=steps, seed=0))]
        first = time.time()
        outputs.append(omni.generate(prompt, OmniDiffusionSamplingParams(num_inference_steps=steps, seed=0)))
        second = time.time()
    return {
        "interpreter_and_torch_s": imported - args.one_start,
        "load_s": loaded - imported,
        "first_picture_s": first - loaded,
        "start_to_first_picture_s": first - args.one_start,
        "second_picture_s": second - first,
        "steps": steps,
        "accelerations": outputs[-1][0].receipt.accelerations,
    }


def load_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to bring ``args.weights`` GB of shards onto the device, by the number of threads that read."""
    from safetensors.torch import save_file

    from vllm_omni.diffusion.model_loader.weights import iterate_weights
    from vllm_omni.platforms import default_device, get_platform

    device = default_device()
    folder = args.scratch / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    files, values = [], torch.randn(_GB // 40).bfloat16()
    for shard in range(args.weights):
        tensors = {f"{shard}.{i}": values.clone() for i in range(20)}
        files.append(folder / f"{shard}.safetensors")
        save_file(tensors, files[-1])
    target = torch.empty(_GB // 40, dtype=torch.bfloat16, device=device)
    results: dict[str, Any] = {"gb": args.weights}
    for num_readers in (0, 1, 2, 4, 8):
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            source = iterate_weights(files, None if num_readers == 0 else device, max(1, num_readers))
            for _, tensor in source:
                target.copy_(tensor)
            get_platform(device).synchronize()
            seconds.append(time.perf_counter() - started)
        results[f"{num_readers} readers"] = {"seconds": min(seconds), "gb_per_s": args.weights / min(seconds)}
        print(num_readers, results[f"{num_readers} readers"], file=sys.stderr, flush=True)
    for path in files:
        path.unlink()
    return results


def main() -> None:
    args = parse_args()
    if args.one_start is not None:
        print(json.dumps(start(args)))
        return
    results: dict[str, Any] = {"environment": environment(), "model": args.full_size or args.model or "shipped"}
    if args.scratch is not None:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        args.scratch = Path(folder)
        if args.weights is not None:
            results["weights"] = load_weights(args)
        else:
            for name in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.startup", *sys.argv[1:], "--scratch", folder]
                command += ["--one-start", str(time.time())]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
                results[name] = json.loads(done.stdout.strip().splitlines()[-1])
                print(name, results[name], file=sys.stderr, flush=True)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
