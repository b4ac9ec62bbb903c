"""Text to video, offline.

python text_to_video.py --prompt "a red circle moving right"
python text_to_video.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a cat walks through tall grass"
python text_to_video.py --model Wan-AI/Wan2.2-TI2V-5B-Diffusers --prompt "waves at dusk" --height 704 --width 1280 \
    --num-frames 121
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.media import write_video


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate a video from a prompt.")
    parser.add_argument("--model", help="folder or hub id; absent: the small model that ships with the package")
    parser.add_argument("--prompt", default="a red circle moving right")
    parser.add_argument("--negative-prompt", help="absent: the model's default, if it has one")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--height", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--width", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--num-frames", type=int, help="absent: the model's default")
    parser.add_argument("--fps", type=float, help="frames per second of the file; absent: the model's default")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; absent: the model's default")
    parser.add_argument("--guidance-scale-2", type=float, help="that of the second expert; absent: the first one's")
    parser.add_argument("--output", type=Path, default=Path("text_to_video.mp4"))
    parser.add_argument("--vae-use-tiling", action="store_true", help="decode in tiles, with less memory")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompt = {"prompt": args.prompt}
    if args.negative_prompt is not None:
        prompt["negative_prompt"] = args.negative_prompt
    sampling_params = OmniDiffusionSamplingParams(
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        fps=args.fps,
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        output_type="np",
    )
    with Omni(args.model, task="text-to-video", vae_use_tiling=args.vae_use_tiling) as omni:
        (output,) = omni.generate(prompt, sampling_params)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_video(output.images[0], args.output, output.receipt.fps)
    print(f"{args.output}: {output.metrics.total_s:.1f} s, {output.receipt}")


if __name__ == "__main__":
    main()
