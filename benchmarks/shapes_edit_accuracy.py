"""Share of held-out instructions that the editing miniature carries out: what must change does, and all else stays.

    python -m benchmarks.shapes_edit_accuracy --json benchmarks/results/shapes_edit_accuracy.json \\
        --contact-sheet docs/shapes_edit.png

Instructions hold combinations that training never saw (`tools/shapes_edit/edits.py`); a judge without any network
reads each picture back (`tools/shapes_edit/judge.py`).
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from PIL import Image

from benchmarks.report import write_json
from benchmarks.shapes_accuracy import contact_sheet, shares_right, table
from tools.shapes import scenes
from tools.shapes.judge import Verdict
from tools.shapes_edit.edits import VERBS, Example, sample_example
from tools.shapes_edit.judge import judge_edit
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.omni import SHIPPED_MODELS

SHOWN_SIDE = 160  # pixels of a picture on the contact sheet


def make_examples(per_verb: int, seed: int, held_out: bool = True) -> list[tuple[str, Example]]:
    """(verb, example) pairs; the same seed gives the same list."""
    rng = random.Random(seed)
    return [(verb, sample_example(rng, verb, want_held_out=held_out)) for verb in VERBS for _ in range(per_verb)]


def edit(args: argparse.Namespace, examples: list[Example]) -> list[Image.Image]:
    """The results, one seed per example; steps are the model's own default unless given."""
    prompts = [
        {"prompt": e.text, "multi_modal_data": {"image": Image.fromarray(scenes.render(e.source))}} for e in examples
    ]
    params = [
        OmniDiffusionSamplingParams(num_inference_steps=args.steps, seed=args.seed + i) for i in range(len(examples))
    ]
    with Omni(args.model, max_num_seqs=args.batch_size) as omni:
        return [output.images[0] for output in omni.generate(prompts, params)]


def side_by_side(source: scenes.Scene, result: Image.Image) -> Image.Image:
    """The source left of the result."""
    pair = Image.new("RGB", (2 * SHOWN_SIDE + 4, SHOWN_SIDE), (235, 235, 235))
    for i, picture in enumerate((Image.fromarray(scenes.render(source)), result.convert("RGB"))):
        shown = picture.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        pair.paste(shown, (i * (SHOWN_SIDE + 4), 0))
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = str(SHIPPED_MODELS["image-edit"])
    parser.add_argument("model", nargs="?", default=shipped, help="absent: the one that ships along")
    parser.add_argument("--num-prompts", type=int, default=100, help="per verb")
    parser.add_argument("--steps", type=int, help="absent: what the model's folder says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--trainable", action="store_true", help="combinations seen in training, for tuning")
    parser.add_argument("--contact-sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    examples = make_examples(args.num_prompts, args.seed, held_out=not args.trainable)
    start = time.perf_counter()
    pictures = edit(args, [example for _, example in examples])
    seconds = time.perf_counter() - start
    results: list[tuple[str, str, Verdict]] = [
        (verb, e.text, judge_edit(p, e.source, e.text)) for (verb, e), p in zip(examples, pictures, strict=True)
    ]
    print(table(results, seconds, "verb"))
    if args.contact_sheet:
        rows = [
            (side_by_side(e.source, p), text, verdict.right)
            for (_, e), p, (_, text, verdict) in zip(examples, pictures, results, strict=True)
        ]
        random.Random(args.seed).shuffle(rows)
        contact_sheet(rows[:48], args.contact_sheet, columns=6)
    if args.json:
        settings = {"num_prompts": args.num_prompts, "steps": args.steps, "seed": args.seed}
        shares = {verb: right / count for verb, (count, right) in shares_right(results).items()}
        write_json(args.json, {"settings": settings, "share_right": shares, "seconds": seconds})


if __name__ == "__main__":
    main()
