"""Find the guidance scale and the time shift with which most captions come out right.

    python -m tools.shapes.tune shapes-qwen-image --scales 2 3 4 6 --shifts 2 4 6

Captions are ones that training may see, so that the held-out ones stay unseen. The best values go to `SHIFT` and
`SAMPLING_DEFAULTS` of `export.py`.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch
from diffusers import QwenImagePipeline

from benchmarks.shapes_accuracy import COUNTS, draw_with_pipeline, make_prompts
from tools.shapes.export import build_scheduler
from tools.shapes.judge import judge


def shares_right(pipe: QwenImagePipeline, args: argparse.Namespace, held_out: bool) -> list[float]:
    """Share of right pictures for one, two and three objects."""
    prompts = make_prompts(args.num_prompts, args.seed, held_out)
    pictures = draw_with_pipeline(pipe, args, [caption for _, caption in prompts])
    right = [(n, judge(picture, caption).right) for (n, caption), picture in zip(prompts, pictures, strict=True)]
    return [sum(ok for n, ok in right if n == count) / args.num_prompts for count in COUNTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pipeline folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--shifts", type=float, nargs="+", default=[2.0, 4.0, 6.0])
    parser.add_argument("--num-prompts", type=int, default=100, help="per object count")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--held-out", action="store_true", help="held-out captions, to report and not to tune")
    args = parser.parse_args()
    pipe = QwenImagePipeline.from_pretrained(args.model).to(args.device)
    print("scale  shift  " + "  ".join(f"{count} object{'s' * (count > 1)}" for count in COUNTS))
    for scale, shift in product(args.scales, args.shifts):
        args.cfg, pipe.scheduler = scale, build_scheduler(shift)
        start = time.perf_counter()
        shares = "  ".join(f"{100 * share:7.1f}%" for share in shares_right(pipe, args, args.held_out))
        print(f"{scale:5.1f}  {shift:5.1f}  {shares}   {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
