"""Text to video by the official client, over /v1/chat/completions.

python openai_chat_client.py --prompt "two cats play on a lawn" --num-frames 81 --fps 16

The answer comes when the video is done. run_curl_text_to_video.sh shows the way by jobs, which outlive a connection.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a server for a video.")
    parser.add_argument("--server", default="http://localhost:8091")
    parser.add_argument("--api-key", default="none", help="if the server was started with one")
    parser.add_argument("--prompt", default="two cats play on a lawn")
    parser.add_argument("--negative-prompt", help="absent: the model's default, if it has one")
    parser.add_argument("--height", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--width", type=int, help="pixels; absent: the model's default")
    parser.add_argument("--num-frames", type=int, help="absent: the model's default")
    parser.add_argument("--fps", type=float, help="frames per second; absent: the model's default")
    parser.add_argument("--num-inference-steps", type=int, help="absent: the model's default")
    parser.add_argument("--guidance-scale", type=float, help="absent: the model's default")
    parser.add_argument("--guidance-scale-2", type=float, help="of the second expert of a model that has two")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("text_to_video.mp4"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    names = ("negative_prompt", "height", "width", "num_frames", "fps", "num_inference_steps")
    names += ("guidance_scale", "guidance_scale_2", "seed")
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key, timeout=24 * 3600)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.prompt}],
        extra_body={name: getattr(args, name) for name in names if getattr(args, name) is not None},
    )
    (part,) = answer.choices[0].message.content
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(base64.b64decode(part["video_url"]["url"].partition(",")[2]))
    print(args.output, answer.receipt)


if __name__ == "__main__":
    main()
