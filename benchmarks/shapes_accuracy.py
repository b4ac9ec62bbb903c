"""Share of held-out captions that the tiny shapes checkpoint draws fully right.

    python benchmarks/shapes_accuracy.py --json benchmarks/results/shapes_accuracy.json --contact-sheet docs/shapes.png

Captions hold combinations that training never saw (`tools/shapes/scenes.py`); a judge without any
network reads each picture back (`tools/shapes/judge.py`). A picture counts when the number of
objects, and every colour, shape, size, relation, position and background its caption names, are right.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import write_json
from tools.shapes import scenes
from tools.shapes.judge import judge
from vllm_omni.entrypoints.omni import SHIPPED_MODEL

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline

COUNTS = (1, 2, 3)
SIDE = scenes.PICTURE_SIZE
NEGATIVE = " "


def make_prompts(per_count: int, seed: int, held_out: bool = True) -> list[tuple[int, str]]:
    """(object count, caption) pairs; the same seed gives the same list."""
    rng = random.Random(seed)
    return [
        (count, scenes.caption(scenes.sample_scene(rng, count, want_held_out=held_out), rng))
        for count in COUNTS
        for _ in range(per_count)
    ]


def draw_with_omni(args: argparse.Namespace, prompts: list[str]) -> list[Image.Image]:
    """Pictures from this engine, one seed per prompt."""
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    requests = [{"prompt": prompt, "negative_prompt": NEGATIVE} for prompt in prompts]
    params = [
        OmniDiffusionSamplingParams(
            height=SIDE,
            width=SIDE,
            num_inference_steps=args.steps,
            true_cfg_scale=args.cfg,
            seed=args.seed + index,
        )
        for index in range(len(prompts))
    ]
    with Omni(args.model, max_num_seqs=args.batch_size) as omni:
        return [output.images[0] for output in omni.generate(requests, params)]


def draw_with_diffusers(args: argparse.Namespace, prompts: list[str]) -> list[Image.Image]:
    """Pictures from the unchanged diffusers pipeline, with the same seeds."""
    import torch
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return draw_with_pipeline(pipe, args, prompts)


def draw_with_pipeline(pipe: QwenImagePipeline, args: argparse.Namespace, prompts: list[str]) -> list[Image.Image]:
    import torch

    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), args.batch_size):
        chunk = prompts[start : start + args.batch_size]
        pictures += pipe(
            chunk,
            negative_prompt=[NEGATIVE] * len(chunk),
            height=SIDE,
            width=SIDE,
            num_inference_steps=args.steps,
            true_cfg_scale=args.cfg,
            generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(chunk))],
        ).images
    return pictures


BACKENDS = {"vllm-omni": draw_with_omni, "diffusers": draw_with_diffusers}


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def contact_sheet(rows: list[tuple[Image.Image, str, bool]], path: Path, columns: int = 8, num_rows: int = 8) -> None:
    """Pictures of one size with their captions; a green bar below a right one, a red bar below a wrong one."""
    rows = rows[: columns * num_rows]
    width, height = rows[0][0].size
    text_width = (width - 4) // 6  # letters
    num_lines = max(len(_wrap(caption, text_width)[:4]) for _, caption, _ in rows)
    cell_width, cell_height = width + 8, height + 14 + 11 * num_lines
    sheet = Image.new("RGB", (columns * cell_width, -(-len(rows) // columns) * cell_height), (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption, right) in enumerate(rows):
        x, y = i % columns * cell_width + 4, i // columns * cell_height + 4
        sheet.paste(picture.convert("RGB"), (x, y))
        colour = (0, 150, 60) if right else (210, 0, 0)
        draw.rectangle((x, y + height, x + width - 1, y + height + 4), fill=colour)
        for line, text in enumerate(_wrap(caption, text_width)[:4]):
            draw.text((x + 2, y + height + 6 + 11 * line), text, fill=(0, 0, 0))
    sheet.save(path)


def shares_right(results: list[tuple[Any, str, Any]]) -> dict[Any, tuple[int, int]]:
    """How many captions each group has, and how many of them are right."""
    shares: dict[Any, tuple[int, int]] = {}
    for group, _, verdict in results:
        count, right = shares.get(group, (0, 0))
        shares[group] = count + 1, right + verdict.right
    return shares


def table(results: list[tuple[Any, str, Any]], seconds: float, group_name: str = "objects") -> str:
    """Share right per group, and how often each kind of fault comes up."""
    lines = [f"{group_name:9s}  prompts  right  share"]
    for group, (count, right) in shares_right(results).items():
        lines.append(f"{group!s:9s}  {count:7d}  {right:5d}  {100 * right / count:5.1f}%")
    faults = Counter(reason.split(":")[0] for _, _, v in results for reason in v.reasons)
    lines.append("faults: " + (", ".join(f"{kind} {n}" for kind, n in faults.most_common()) or "none"))
    lines.append(f"{seconds:.1f} s, {seconds / max(1, len(results)):.2f} s each")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODEL), help="absent: the one that ships along")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="vllm-omni")
    parser.add_argument("--num-prompts", type=int, default=200, help="per object count")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="diffusers only")
    parser.add_argument("--trainable", action="store_true", help="combinations seen in training, for tuning")
    parser.add_argument("--contact-sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = make_prompts(args.num_prompts, args.seed, held_out=not args.trainable)
    start = time.perf_counter()
    pictures = BACKENDS[args.backend](args, [text for _, text in prompts])
    seconds = time.perf_counter() - start
    results = [(count, text, judge(p, text)) for (count, text), p in zip(prompts, pictures, strict=True)]
    print(table(results, seconds))
    if args.contact_sheet:
        rows = [(p, text, v.right) for p, (_, text, v) in zip(pictures, results, strict=True)]
        random.Random(args.seed).shuffle(rows)
        contact_sheet(rows, args.contact_sheet)
    if args.json:
        shares = {group: right / count for group, (count, right) in shares_right(results).items()}
        settings = {"backend": args.backend, "num_prompts": args.num_prompts, "steps": args.steps, "cfg": args.cfg}
        write_json(args.json, {"settings": {**settings, "seed": args.seed}, "share_right": shares, "seconds": seconds})


if __name__ == "__main__":
    main()
