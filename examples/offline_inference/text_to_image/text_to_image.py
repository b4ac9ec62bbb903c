"""Text to image, offline.

python text_to_image.py --prompt "a large red circle left of a small blue square on a yellow background"
python text_to_image.py --model Qwen/Qwen-Image --prompt "a cat holding a sign" --height 1024 --width 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate pictures from a prompt.")
    parser.add_argument("--model", help="folder or hub id; absent: the small model that ships with the package")
    parser.add_argument("--prompt", default="a red circle on a blue background")
    parser.add_argument("--negative-prompt", help="absent: the model's default, if it has one")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--height", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--width", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--cfg-scale", type=float, help="true classifier-free guidance; absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="embedded guidance of a guidance-distilled model")
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("text_to_image.png"))
    parser.add_argument("--vae-use-slicing", action="store_true")
    parser.add_argument("--vae-use-tiling", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompt = {"prompt": args.prompt}
    if args.negative_prompt is not None:
        prompt["negative_prompt"] = args.negative_prompt
    sampling_params = OmniDiffusionSamplingParams(
        height=args.height,
        width=args.width,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        true_cfg_scale=args.cfg_scale,
        guidance_scale=args.guidance_scale,
        num_outputs_per_prompt=args.num_images_per_prompt,
    )
    with Omni(args.model, vae_use_slicing=args.vae_use_slicing, vae_use_tiling=args.vae_use_tiling) as omni:
        (output,) = omni.generate(prompt, sampling_params)
    for index, picture in enumerate(output.images):
        path = args.output if len(output.images) == 1 else args.output.with_stem(f"{args.output.stem}_{index}")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        print(f"{path}: {picture.width} x {picture.height}, {output.metrics.total_s:.1f} s, {output.receipt}")


if __name__ == "__main__":
    main()
