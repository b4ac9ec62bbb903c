"""Every example runs as it is written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from tests import tiny_flux, tiny_wan

EXAMPLES = Path(__file__).parent.parent / "examples" / "offline_inference"


def run(monkeypatch, script, *arguments):
    path = EXAMPLES / script
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_text_to_image(monkeypatch, qwen_folder, tmp_path, capsys):
    output = tmp_path / "out" / "picture.png"
    run(
        monkeypatch,
        "text_to_image/text_to_image.py",
        *("--model", qwen_folder, "--prompt", "a cat", "--negative-prompt", "blurry", "--cfg-scale", 3.0),
        *("--seed", 1, "--height", 32, "--width", 48, "--num-inference-steps", 2, "--num-images-per-prompt", 2),
        *("--output", output, "--vae-use-tiling"),
    )
    for index in range(2):
        with Image.open(tmp_path / "out" / f"picture_{index}.png") as picture:
            assert picture.size == (48, 32)
    assert "classifier-free, scale 3" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["text_to_video", "image_to_video"])
def test_a_video_of_the_asked_size_is_written(monkeypatch, tmp_path, task):
    build = tiny_wan.wan_t2v if task == "text_to_video" else tiny_wan.wan_i2v
    arguments = ["--model", build(tmp_path / "model"), "--prompt", "a cat", "--negative-prompt", "blurry"]
    if task == "image_to_video":
        Image.new("RGB", (40, 40), "red").save(tmp_path / "cat.png")
        arguments += ["--image", tmp_path / "cat.png"]
    arguments += ["--height", 32, "--width", 48, "--num-frames", 5, "--fps", 8, "--num-inference-steps", 2]
    arguments += ["--guidance-scale", 4, "--guidance-scale-2", 3, "--seed", 1, "--vae-use-tiling"]
    output = tmp_path / "out" / "video.mp4"
    run(monkeypatch, f"{task}/{task}.py", *arguments, "--output", output)
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 8)
        assert len(list(container.decode(stream))) == 5


def test_without_a_model_the_shipped_ones_are_used(monkeypatch, tmp_path):
    run(monkeypatch, "text_to_image/text_to_image.py", "--output", tmp_path / "a.png", "--num-inference-steps", 2)
    edit = ["--image", tmp_path / "a.png", "--prompt", "make the circle green", "--height", 64, "--width", 64]
    run(monkeypatch, "image_to_image/image_edit.py", *edit, "--output", tmp_path / "b.png")
    run(monkeypatch, "text_to_video/text_to_video.py", "--output", tmp_path / "c.mp4", "--num-inference-steps", 2)
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (64, 64)
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert len(list(container.decode(video=0))) == 16


def test_image_edit(monkeypatch, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    output = tmp_path / "out" / "edited.png"
    run(
        monkeypatch,
        "image_to_image/image_edit.py",
        *("--model", tiny_flux.flux_kontext(tmp_path / "model"), "--image", tmp_path / "red.png", "--prompt", "a cat"),
        *("--negative-prompt", "blurry", "--cfg-scale", 2.0, "--guidance-scale", 2.5, "--seed", 1),
        *("--height", 64, "--width", 96, "--num-inference-steps", 1, "--output", output),
    )
    with Image.open(output) as picture:
        assert picture.size == (96, 64)
