"""The video examples run as they are written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from tests import tiny_wan

EXAMPLES = Path(__file__).parent.parent / "examples" / "offline_inference"
SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--fps", "8", "--num-inference-steps", "2")


@pytest.mark.parametrize("task", ["text_to_video", "image_to_video"])
def test_a_video_of_the_asked_size_is_written(monkeypatch, tmp_path, task):
    build = tiny_wan.wan_t2v if task == "text_to_video" else tiny_wan.wan_i2v
    arguments = ["--model", str(build(tmp_path / "model")), "--prompt", "a cat", "--negative-prompt", "blurry", *SMALL]
    if task == "image_to_video":
        Image.new("RGB", (40, 40), "red").save(tmp_path / "cat.png")
        arguments += ["--image", str(tmp_path / "cat.png")]
    output = tmp_path / "out" / "video.mp4"
    arguments += ["--guidance-scale", "4", "--guidance-scale-2", "3", "--seed", "1", "--output", str(output)]
    script = EXAMPLES / task / f"{task}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--vae-use-tiling"])
    runpy.run_path(str(script), run_name="__main__")
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 8)
        assert len(list(container.decode(stream))) == 5
