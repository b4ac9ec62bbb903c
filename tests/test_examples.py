"""Every example runs as it is written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch, script, *arguments):
    path = EXAMPLES / script
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_text_to_image(monkeypatch, qwen_folder, tmp_path, capsys):
    output = tmp_path / "out" / "picture.png"
    run(
        monkeypatch,
        "offline_inference/text_to_image/text_to_image.py",
        *("--model", qwen_folder, "--prompt", "a cat", "--negative-prompt", "blurry", "--cfg-scale", 3.0),
        *("--seed", 1, "--height", 32, "--width", 48, "--num-inference-steps", 2, "--num-images-per-prompt", 2),
        *("--output", output, "--vae-use-tiling"),
    )
    for index in range(2):
        with Image.open(tmp_path / "out" / f"picture_{index}.png") as picture:
            assert picture.size == (48, 32)
    assert "classifier-free, scale 3" in capsys.readouterr().out
