"""Seconds from prompt embeddings to pictures of a full-size model with random weights, through ``Omni``.

    python -m benchmarks.full_size_generate flux --json benchmarks/results/flux_generate.json
    python -m benchmarks.full_size_generate qwen-image --json benchmarks/results/qwen_image_generate.json
    python -m benchmarks.full_size_generate qwen-image --side 512 --steps 10 --batches 1 8 --cases compiled

Needs a GPU with 80 GB. bfloat16; FLUX.1-dev takes 28 steps, Qwen-Image 50 steps with classifier-free guidance, unless
``--steps`` says otherwise. Text encoders are in memory and not run. A cache skips by a fixed pattern
(``cache_dit`` with a static mask): what a threshold would skip means nothing with random weights. Each case runs in a
process of its own. The case ``diffusers`` is its pipeline with the same inputs, its blocks compiled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import exclusive, shared
from benchmarks.full_size_models import CONFIGS
from benchmarks.full_size_peer import compiled_peer
from benchmarks.report import environment, median, write_json


def _mask(policy: str) -> dict[str, Any]:
    options = {"scm_steps_mask_policy": policy, "scm_steps_policy": "static", "max_continuous_cached_steps": -1}
    return {"cache_backend": "cache_dit", "cache_config": options}


_FP8 = {"quantization": "fp8", "attention_dtype": "fp8"}
CASES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "compiled, medium mask": {"enforce_eager": False, **_mask("medium")},
    "fp8": {"enforce_eager": False, "quantization": "fp8"},
    "fp8, medium mask": {"enforce_eager": False, "quantization": "fp8", **_mask("medium")},
    "fp8 with attention": {"enforce_eager": False, **_FP8},
    "fp8 with attention, medium mask": {"enforce_eager": False, **_FP8, **_mask("medium")},
    "fp8 with attention, balanced mask": {"enforce_eager": False, **_FP8, **_mask("balanced")},
    "fp8 with attention, fast mask": {"enforce_eager": False, **_FP8, **_mask("fast")},
    "diffusers": {},
}
STEPS = {"flux": 28, "qwen-image": 50}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=STEPS)
    parser.add_argument("--case", choices=CASES, help="measure one and print JSON")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=CASES)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="requests at once")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for configurations with text encoders of one layer")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prompt(model: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if model == "flux":
        return {
            "prompt_embeds": torch.randn(1, 512, 4096, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
        }
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 128, 3584, generator=generator) for name in names}


def copied(folder: Path, scratch: Path, *, one_text_layer: bool) -> Path:
    """A copy of the configurations, if asked for with text encoders of one layer: for those take memory."""
    copy = scratch / folder.name
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for path in copy.glob("text_encoder*/config.json") if one_text_layer else ():
        path.write_text(json.dumps(_one_layer(json.loads(path.read_text()))))
    return copy


def _one_layer(config: dict[str, Any]) -> dict[str, Any]:
    shorter: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("num_hidden_layers", "num_layers", "depth"):
            shorter[name] = 1
        elif name == "layer_types":
            shorter[name] = value[:1]
        else:
            shorter[name] = _one_layer(value) if isinstance(value, dict) else value
    return shorter


def folder_of(args: argparse.Namespace) -> Path:
    folder = CONFIGS / {"flux": "flux.1-dev", "qwen-image": "qwen-image"}[args.model]
    if args.scratch is None:
        return folder
    return copied(folder, args.scratch, one_text_layer=True)  # text encoders are not run


def measure_diffusers(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = STEPS[args.model] if args.steps is None else args.steps
    inputs: dict[str, Any] = {"height": args.side, "width": args.side}
    if args.model == "qwen-image":
        inputs["true_cfg_scale"] = 4.0
    results: dict[str, Any] = {}
    started = time.perf_counter()
    with shared(args.lock):
        pipeline = compiled_peer(folder_of(args), device)
        results["start_s"] = time.perf_counter() - started
        for batch in args.batches:
            pipeline(num_inference_steps=4, **inputs, **peer_prompts(args.model, batch, device))
        results["first_pictures_s"] = time.perf_counter() - started
    for batch in args.batches:
        prompts = peer_prompts(args.model, batch, device)
        with exclusive(args.lock):
            seconds = []
            for _ in range(args.trials):
                started = time.perf_counter()
                pipeline(num_inference_steps=steps, **inputs, **prompts)
                seconds.append(time.perf_counter() - started)
        results[f"batch {batch}"] = {"seconds": median(seconds), "pictures_per_second": batch / median(seconds)}
        print(args.model, args.case, batch, results[f"batch {batch}"], file=sys.stderr, flush=True)
    return results


def peer_prompts(model: str, batch: int, device: str) -> dict[str, torch.Tensor]:
    """The prompts of a batch as the diffusers pipeline takes them."""
    prompts = [prompt(model, seed) for seed in range(batch)]
    return {name: torch.cat([each[name] for each in prompts]).to(device, torch.bfloat16) for name in prompts[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    folder = folder_of(args)
    steps = STEPS[args.model] if args.steps is None else args.steps
    params = OmniDiffusionSamplingParams(height=args.side, width=args.side, num_inference_steps=steps, seed=0)
    few = OmniDiffusionSamplingParams(height=args.side, width=args.side, num_inference_steps=5, seed=0)
    results: dict[str, Any] = {}
    started = time.perf_counter()
    with shared(args.lock):
        omni = Omni(str(folder), load_format="dummy", show_progress=False, **CASES[args.case])
        results["start_s"] = time.perf_counter() - started
        for batch in args.batches:
            omni.generate([prompt(args.model, seed) for seed in range(batch)], few)
        results["first_pictures_s"] = time.perf_counter() - started
    with omni:
        for batch in args.batches:
            prompts = [prompt(args.model, seed) for seed in range(batch)]
            with exclusive(args.lock):
                outputs, seconds = [], []
                for _ in range(args.trials):
                    started = time.perf_counter()
                    outputs = omni.generate(prompts, params)
                    seconds.append(time.perf_counter() - started)
            receipt = outputs[0].receipt
            assert receipt is not None
            results[f"batch {batch}"] = {
                "seconds": median(seconds),
                "pictures_per_second": batch / median(seconds),
                "denoise_s": outputs[0].metrics.denoise_s,
                "decode_s": outputs[0].metrics.decode_s,
                "prepare_s": outputs[0].metrics.prepare_s,
                "post_process_s": outputs[0].metrics.post_process_s,
                "peak_memory_gib": max(output.metrics.peak_memory_bytes for output in outputs) / 2**30,
                "accelerations": receipt.accelerations,
                "attention_backends": receipt.attention_backends,
            }
            print(args.model, args.case, batch, results[f"batch {batch}"], file=sys.stderr, flush=True)
    return results


def main() -> None:
    args = parse_args()
    if args.case is not None:
        measured = measure_diffusers(args) if args.case == "diffusers" else measure(args)
        print(json.dumps({"environment": environment(), **measured}))
        return
    results: dict[str, Any] = {"model": args.model, "side": args.side, "steps": args.steps or STEPS[args.model]}
    for case in args.cases:
        command = [sys.executable, "-m", "benchmarks.full_size_generate", *sys.argv[1:], "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        failed = {"error": f"exit status {done.returncode}"}
        results[case] = failed if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])
    write_json(args.json, results)


if __name__ == "__main__":
    main()
