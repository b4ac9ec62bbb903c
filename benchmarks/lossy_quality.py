"""What each lossy mode costs in quality: the shipped model's accuracy, and PSNR against its exact pictures.

    python -m benchmarks.lossy_quality --json benchmarks/results/lossy_quality.json

Captions, seeds and judge are those of ``shapes_accuracy.py``: held-out combinations of one to three objects;
``--samples`` draws others. Each picture is held against the exact one of its caption and seed: ``lost`` were right and
no longer are, ``won`` the other way round, and the standard error is that of the paired difference. FP8 needs a GPU
that has it; without one its rows are left out, or emulated with ``--emulate-fp8``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import write_json
from benchmarks.shapes_accuracy import NEGATIVE, SIDE, make_prompts
from tools.shapes.judge import judge
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.benchmarks.similarity import psnr
from vllm_omni.diffusion.attention import fp8
from vllm_omni.entrypoints.omni import SHIPPED_MODEL
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.platforms import CpuPlatform, default_device, get_platform


def _tea(threshold: float) -> dict[str, Any]:
    return {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": threshold}}


def _dit(**options: Any) -> dict[str, Any]:
    return {"cache_backend": "cache_dit", "cache_config": options}


def _mask(policy: str, **options: Any) -> dict[str, Any]:
    return _dit(scm_steps_mask_policy=policy, scm_steps_policy="static", max_continuous_cached_steps=-1, **options)


FP8 = {"quantization": "fp8"}
FP8_ATTENTION = {"quantization": "fp8", "attention_dtype": "fp8"}
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "fp8": FP8,
    "fp8 with attention": FP8_ATTENTION,
    "tea_cache 0.05": _tea(0.05),
    "tea_cache 0.07": _tea(0.07),
    "tea_cache 0.1": _tea(0.1),
    "tea_cache 0.15": _tea(0.15),
    "tea_cache 0.2": _tea(0.2),
    "cache_dit 0.12": _dit(residual_diff_threshold=0.12),
    "cache_dit 0.24": _dit(residual_diff_threshold=0.24),
    "cache_dit 0.24, TaylorSeer": _dit(residual_diff_threshold=0.24, enable_taylorseer=True),
    "cache_dit, medium mask": _mask("medium"),
    "cache_dit, balanced mask": _mask("balanced"),
    "cache_dit, fast mask": _mask("fast"),
    "cache_dit, fast mask, TaylorSeer": _mask("fast", enable_taylorseer=True),
    "fp8 with attention, tea_cache 0.05": FP8_ATTENTION | _tea(0.05),
    "fp8 with attention, tea_cache 0.1": FP8_ATTENTION | _tea(0.1),
    "fp8 with attention, cache_dit 0.12": FP8_ATTENTION | _dit(residual_diff_threshold=0.12),
    "fp8 with attention, medium mask": FP8_ATTENTION | _mask("medium"),
    "fp8 with attention, balanced mask": FP8_ATTENTION | _mask("balanced"),
    "fp8 with attention, fast mask": FP8_ATTENTION | _mask("fast"),
}


@dataclass(frozen=True)
class _Judged:
    pictures: Sequence[Image.Image]
    right: Sequence[bool]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODEL))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--num-prompts", type=int, default=100, help="per number of objects and sample")
    parser.add_argument("--samples", type=int, nargs="+", default=[0], help="draws of captions and seeds (default: 0)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-batch-size", type=int, default=16, help="rows of a forward (default: 16)")
    parser.add_argument("--emulate-fp8", action="store_true", help="compute FP8 on a CPU as well, slowly")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def paired_difference(right: Sequence[bool], exactly_right: Sequence[bool]) -> dict[str, float]:
    """Points between two modes on the same captions and seeds, from which of their pictures are right."""
    change = np.asarray(right, dtype=int) - np.asarray(exactly_right, dtype=int)
    return {
        "points": 100 * float(change.mean()),
        "standard_error": 100 * float(change.std() / len(change) ** 0.5),
        "lost": int((change < 0).sum()),
        "won": int((change > 0).sum()),
    }


def _figures(outputs: Sequence[OmniRequestOutput], right: Sequence[bool], exact: _Judged | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"accuracy": 100 * float(np.mean(right))}
    if exact is not None:
        figures |= paired_difference(right, exact.right)
        pairs = zip(outputs, exact.pictures, strict=True)
        ratios = [min(psnr(output.images[0], other), 100.0) for output, other in pairs]
        figures["psnr_median"] = float(np.median(ratios))
    skipped = [output.receipt.step_cache for output in outputs]
    if skipped[0] is not None:
        figures["skipped"] = sum(use.num_skipped for use in skipped) / sum(use.num_forwards for use in skipped)
    return figures


def main() -> None:
    args = parse_args()
    drawn = [
        (text, 100_000 * sample + index)
        for sample in args.samples
        for index, (_, text) in enumerate(make_prompts(args.num_prompts, sample))
    ]
    if args.emulate_fp8:
        CpuPlatform.why_no_fp8 = lambda platform: None  # type: ignore[method-assign]
        fp8.why_unavailable = lambda device: None  # type: ignore[assignment]
    has_fp8 = get_platform(default_device()).why_no_fp8() is None
    modes = [mode for mode in args.modes if has_fp8 or "quantization" not in MODES[mode]]
    if modes[0] != "exact":
        modes.insert(0, "exact")
    results: dict[str, Any] = {}
    exact = None
    for mode in modes:
        started = time.perf_counter()
        params = [
            OmniDiffusionSamplingParams(
                height=SIDE, width=SIDE, num_inference_steps=args.steps, true_cfg_scale=4.0, seed=seed
            )
            for _, seed in drawn
        ]
        with Omni(args.model, show_progress=False, max_batch_size=args.max_batch_size, **MODES[mode]) as omni:
            outputs = omni.generate([{"prompt": text, "negative_prompt": NEGATIVE} for text, _ in drawn], params)
        right = [judge(output.images[0], text).right for output, (text, _) in zip(outputs, drawn, strict=True)]
        figures = _figures(outputs, right, exact)
        exact = exact or _Judged([output.images[0] for output in outputs], right)
        print(mode, figures, f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        results[mode] = figures | {"right": "".join("01"[one] for one in right)}
    settings = {"num_prompts": len(drawn), "samples": args.samples, "steps": args.steps}
    write_json(args.json, {**settings, "modes": results})


if __name__ == "__main__":
    main()
