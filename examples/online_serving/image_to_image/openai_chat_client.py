"""Image edit by the official client, over /v1/chat/completions.

python openai_chat_client.py --image cat.png --prompt "turn the cat into a dog"
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a server to edit pictures.")
    parser.add_argument("--server", default="http://localhost:8091")
    parser.add_argument("--api-key", default="none", help="if the server was started with one")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="one picture, or several")
    parser.add_argument("--prompt", required=True, help="what to change")
    parser.add_argument("--negative-prompt", help="absent: the model's default, if it has one")
    parser.add_argument("--height", type=int, help="pixels; absent: as the model derives it from the picture")
    parser.add_argument("--width", type=int, help="pixels; absent: as the model derives it from the picture")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--cfg-scale", type=float, help="true classifier-free guidance; absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="embedded guidance of a guidance-distilled model")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("image_to_image.png"))
    return parser.parse_args()


def data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


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
    pictures = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in args.image]
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [{"type": "text", "text": args.prompt}, *pictures]}],
        extra_body={name: value for name, value in parameters.items() if value is not None},
    )
    (part,) = answer.choices[0].message.content
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
    print(args.output, answer.receipt)


if __name__ == "__main__":
    main()
