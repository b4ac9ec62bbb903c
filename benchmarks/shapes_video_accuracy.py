"""Share of held-out captions that the video miniature shows fully right.

    python -m benchmarks.shapes_video_accuracy --json benchmarks/results/shapes_video_accuracy.json \\
        --contact-sheet docs/shapes_video.png

Captions name a colour, shape and direction that training never saw together (`tools/shapes_wan/clips.py`); a judge
without any network follows the object through all frames (`tools/shapes_wan/judge.py`). What is not given by an
option is the checkpoint's own default.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import write_json
from benchmarks.shapes_accuracy import contact_sheet, shares_right, table
from tools.shapes_wan.clips import parse_caption, sample_captions
from tools.shapes_wan.judge import judge
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.omni import SHIPPED_MODELS

_SHEET_FRAMES = (0, 3, 6, 9, 12, 15)
_SAMPLING = ("num_inference_steps", "guidance_scale")


def generate(args: argparse.Namespace, captions: list[str]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Clips uint8 [F, H, W, 3], one seed per caption, and what they were made with."""
    given = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    params = [
        OmniDiffusionSamplingParams(seed=args.seed + index, output_type="np", **given) for index in range(len(captions))
    ]
    with Omni(args.model, dtype=args.dtype, max_num_seqs=args.batch_size, max_batch_size=args.batch_size) as omni:
        outputs = omni.generate(captions, params)
    receipt = outputs[0].receipt
    used = {name: getattr(receipt, name) for name in ("num_inference_steps", "guidance", "dtype", "device")}
    return [(output.images[0] * 255).round().astype(np.uint8) for output in outputs], {"seed": args.seed, **used}


def strip(frames: np.ndarray) -> Image.Image:
    """Some frames side by side."""
    return Image.fromarray(np.concatenate(list(frames[list(_SHEET_FRAMES)]), axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODELS["text-to-video"]))
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-inference-steps", "--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trainable", action="store_true", help="combinations seen in training, for tuning")
    parser.add_argument("--contact-sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    captions = sample_captions(args.num_prompts, random.Random(args.seed), want_held_out=not args.trainable)
    start = time.perf_counter()
    clips, settings = generate(args, captions)
    seconds = time.perf_counter() - start
    results = [(parse_caption(t).direction, t, judge(c, t)) for t, c in zip(captions, clips, strict=True)]
    right = sum(verdict.right for _, _, verdict in results)
    print(table(results, seconds, "direction"))
    print(f"right: {right} of {len(results)}, {100 * right / len(results):.1f}%")
    if args.contact_sheet:
        rows = [(strip(c), t, v.right) for c, (_, t, v) in zip(clips, results, strict=True)]
        contact_sheet(rows, args.contact_sheet, columns=2, num_rows=12)
    if args.json:
        shares = {group: right / count for group, (count, right) in shares_right(results).items()}
        faults = [(t, v.reasons) for _, t, v in results if not v.right]
        report = {"settings": settings, "num_prompts": len(results), "share_right": right / len(results)}
        write_json(args.json, {**report, "by_direction": shares, "wrong": faults, "seconds": seconds})


if __name__ == "__main__":
    main()
