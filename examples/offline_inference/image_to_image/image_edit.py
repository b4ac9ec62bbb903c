"""Change a picture as a text says, offline.

python image_edit.py --image red_circle.png --prompt "make the circle green"
python image_edit.py --model Qwen/Qwen-Image-Edit --image cat.png --prompt "make the cat black"
python image_edit.py --model black-forest-labs/FLUX.1-Kontext-dev --image cat.png --prompt "add a hat"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit a picture.")
    parser.add_argument("--model", help="folder or hub id; absent: the small model that ships with the package")
    parser.add_argument("--image", type=Path, required=True, nargs="+", help="picture, or several for some models")
    parser.add_argument("--prompt", required=True, help="what to change")
    parser.add_argument("--negative-prompt", help="classifier-free guidance needs one")
    parser.add_argument("--cfg-scale", type=float, help="true classifier-free guidance; absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="embedded guidance of a guidance-distilled model")
    parser.add_argument("--height", type=int, help="pixels; absent: from the picture, or the model's default")
    parser.add_argument("--width", type=int, help="pixels; absent: from the picture, or the model's default")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("image_edit.png"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # A prompt holds the contents of a picture, never its path.
    prompt = {"prompt": args.prompt, "multi_modal_data": {"image": [path.read_bytes() for path in args.image]}}
    if args.negative_prompt is not None:
        prompt["negative_prompt"] = args.negative_prompt
    sampling_params = OmniDiffusionSamplingParams(
        height=args.height,
        width=args.width,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        true_cfg_scale=args.cfg_scale,
        guidance_scale=args.guidance_scale,
    )
    with Omni(args.model, task="image-edit") as omni:
        (output,) = omni.generate(prompt, sampling_params)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    output.images[0].save(args.output)
    print(f"{args.output}: {output.metrics.total_s:.1f} s, {output.receipt}")


if __name__ == "__main__":
    main()
