"""What the engine costs on top of the transformer, and how it compares with diffusers on the same folder.

    python -m benchmarks.overhead --json benchmarks/results/overhead.json

Three ratios of medians, measured in turns within one process: seconds of ``Omni.generate`` over seconds of diffusers'
pipeline at batch 1, the same per picture at batch 4, and seconds of the engine's steps over those of a bare loop that
calls the transformer on the same batch as often.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline

from benchmarks.report import alternate, median, write_json
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.denoise import DenoiseState, _collate, _Rows, denoise_step
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
    """Median seconds of the steps of one guided request, driven by the engine's function and by a bare loop."""
    engine = omni._engine
    assert engine is not None
    params = OmniDiffusionSamplingParams(num_inference_steps=args.steps, true_cfg_scale=4.0, seed=0)
    request = engine.validate({"prompt": PROMPTS[0], "negative_prompt": " "}, params)
    pipeline = engine._executor._worker._runner.pipeline  # type: ignore[union-attr]

    def fresh_state() -> DenoiseState:
        with torch.inference_mode():
            return pipeline.prepare(request)

    state = fresh_state()
    rows = [_Rows(state, branch, 0, 1) for branch in range(2)]
    with torch.inference_mode():
        conditions = _collate(rows, pipeline.sequence_conditions)
        latents = torch.cat([state.latents] * 2).to(pipeline.dtype)
        timestep = state.timesteps[:1].expand(2) / 1000

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(args.steps):
            pipeline.transformer(hidden_states=latents, timestep=timestep, **conditions)

    @torch.inference_mode()
    def driven(state: DenoiseState) -> None:
        while not state.is_done:
            denoise_step([state], pipeline)

    states = [fresh_state() for _ in range(args.trials + 1)]
    times = alternate({"engine": lambda: driven(states.pop()), "bare loop": bare}, args.trials)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = {"model": args.model, "steps": args.steps, "trials": args.trials}
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
    write_json(args.json, results)


if __name__ == "__main__":
    main()
