"""Text to image by the official client, over /v1/chat/completions.

python openai_chat_client.py --prompt "a large red circle left of a small blue square on a yellow background"
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a server for pictures.")
    parser.add_argument("--server", default="http://localhost:8091")
    parser.add_argument("--api-key", default="none", help="if the server was started with one")
    parser.add_argument("--prompt", default="a red circle on a blue background")
    parser.add_argument("--negative-prompt", help="absent: the model's default, if it has one")
    parser.add_argument("--height", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--width", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--cfg-scale", type=float, help="true classifier-free guidance; absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="embedded guidance of a guidance-distilled model")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("text_to_image.png"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    parameters = {
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.num_inference_steps,
        "true_cfg_scale": args.cfg_scale,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
    }
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.prompt}],
        n=args.num_images_per_prompt,
        extra_body={name: value for name, value in parameters.items() if value is not None},
    )
    parts = answer.choices[0].message.content
    for index, part in enumerate(parts):
        path = args.output if len(parts) == 1 else args.output.with_stem(f"{args.output.stem}_{index}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
        print(path)
    print(answer.receipt)


if __name__ == "__main__":
    main()
