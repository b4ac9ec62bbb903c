"""What the engine costs on top of the transformer, and how it compares with diffusers on the same folder.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json

Three ratios of medians, measured in turns within one process: seconds of ``Omni.generate`` over seconds of diffusers'
pipeline at batch 1, the same per picture at batch 4, and seconds of a guided request's steps in ``Omni.generate``, with
scheduler, executor and worker, over those of a bare loop that calls the transformer on the same rows as often. Then the
milliseconds of CPU time that the engine itself takes for a step, with a transformer that computes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import QwenImagePipeline

from benchmarks.report import alternate, median, write_json
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.step_plan import plan_steps
from vllm_omni.entrypoints.omni import SHIPPED_MODEL

PROMPTS = [
    "a red circle on a blue background",
    "a large green square left of a small purple star on a white background",
    "a yellow triangle above a white circle on a black background",
    "a small orange star on a white background",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compare_with_diffusers(omni: Omni, args: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """Median seconds of both for one call that makes ``batch_size`` pictures."""
    reference = QwenImagePipeline.from_pretrained(args.model)
    reference.set_progress_bar_config(disable=True)
    prompts = PROMPTS[:batch_size]
    params = OmniDiffusionSamplingParams(
        num_inference_steps=args.steps, true_cfg_scale=4.0, seed=0, height=256, width=256
    )

    def ours() -> Any:
        return omni.generate([{"prompt": prompt, "negative_prompt": " "} for prompt in prompts], params)

    def theirs() -> Any:
        return reference(
            prompts,
            negative_prompt=[" "] * batch_size,
            true_cfg_scale=4.0,
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(0) for _ in prompts],
            height=256,
            width=256,
        )

    times = alternate({"vllm-omni": ours, "diffusers": theirs}, args.trials)
    return {name: median(values) for name, values in times.items()}


def compare_with_bare_loop(omni: Omni, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the steps of one guided request, driven by the engine and by a bare loop."""
    prompt = {"prompt": PROMPTS[0], "negative_prompt": " "}
    params = OmniDiffusionSamplingParams(num_inference_steps=args.steps, true_cfg_scale=4.0, seed=0)
    pipeline = omni._engine._executor._worker._runner.pipeline  # type: ignore[union-attr]
    with torch.inference_mode():
        state = pipeline.prepare(omni.resolve(prompt, params))
        (forward,) = plan_steps([state], pipeline.sequence_conditions, max_batch_size=2).forwards
        latents = torch.cat([state.latents] * 2).to(pipeline.dtype)

    @torch.inference_mode()
    def bare() -> float:
        started = time.perf_counter()
        for timestep in forward.timesteps:
            pipeline.transformer(hidden_states=latents, timestep=timestep / 1000, **forward.conditions)
        return time.perf_counter() - started

    def driven() -> float:
        (output,) = omni.generate(prompt, params)
        return output.metrics.denoise_s

    seconds: dict[str, list[float]] = {"engine": [], "bare loop": []}
    for trial in range(args.trials + 1):
        for name, run in (("engine", driven), ("bare loop", bare)):
            elapsed = run()
            if trial > 0:
                seconds[name].append(elapsed)
    return {name: median(values) for name, values in seconds.items()}


def measure_engine_alone(omni: Omni, args: argparse.Namespace, batch_size: int) -> float:
    """Median milliseconds of CPU time per step of ``batch_size`` guided requests, the transformer left out."""
    num_steps = 20 * args.steps  # so that encoding and decoding, measured apart, weigh little
    params = OmniDiffusionSamplingParams(num_inference_steps=num_steps, true_cfg_scale=4.0, seed=0)
    prompts = [{"prompt": prompt, "negative_prompt": " "} for prompt in PROMPTS[:batch_size]]

    def cpu_seconds(params: OmniDiffusionSamplingParams) -> float:
        started = time.process_time()
        omni.generate(prompts, params)
        return time.process_time() - started

    transformer = omni._engine._executor._worker._runner.pipeline.transformer  # type: ignore[union-attr]
    with mock.patch.object(transformer, "forward", lambda hidden_states, **_: hidden_states * 0.5):
        both = [
            (cpu_seconds(params), cpu_seconds(dataclasses.replace(params, num_inference_steps=1)))
            for _ in range(args.trials)
        ]
    return 1000 * median([whole - ends for whole, ends in both]) / (num_steps - 1)


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = {"model": Path(args.model).name, "steps": args.steps, "trials": args.trials}
    with Omni(args.model, show_progress=False) as omni:
        for batch_size in (1, 4):
            seconds = compare_with_diffusers(omni, args, batch_size)
            ratio = seconds["vllm-omni"] / seconds["diffusers"]
            results[f"batch_{batch_size}"] = {"seconds": seconds, "ratio": ratio}
            print(f"batch {batch_size}: {seconds}, ratio vllm-omni / diffusers {ratio:.3f}")
        seconds = compare_with_bare_loop(omni, args)
        ratio = seconds["engine"] / seconds["bare loop"]
        results["steps_over_bare_loop"] = {"seconds": seconds, "ratio": ratio}
        print(f"steps: {seconds}, ratio engine / bare loop {ratio:.3f}")
        for batch_size in (1, 4):
            milliseconds = measure_engine_alone(omni, args, batch_size)
            results[f"engine_alone_batch_{batch_size}_ms_per_step"] = milliseconds
            print(f"engine alone, batch {batch_size}: {milliseconds:.3f} ms of CPU time per step")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
