"""Every online example runs as it is written: its server, its client, its script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import av
import pytest
from PIL import Image

from tests import tiny_flux, tiny_wan

EXAMPLES = Path(__file__).parent.parent / "examples" / "online_serving"


@contextmanager
def served(task, model=None, **variables):
    """The environment of a client of the example's ``run_server.sh``."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLES.parent.parent),
        "PORT": "0",
        **variables,
    }
    if model is not None:
        environment["MODEL"] = str(model)
    command = ["bash", str(EXAMPLES / task / "run_server.sh"), "--device", "cpu"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            address = re.search(r"at (http://\S+)", line)
            assert address, f"the server said {line!r}"
            yield environment | {"SERVER": address[1]}
        finally:
            server.terminate()
        assert server.wait(timeout=60) == 0


def run(command, environment):
    """What it printed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def client(task, environment, *arguments):
    command = [sys.executable, str(EXAMPLES / task / "openai_chat_client.py"), "--server", environment["SERVER"]]
    return run([*command, *map(str, arguments)], environment)


def script(task, name, environment, *arguments, **variables):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    environment = environment | {key: str(value) for key, value in variables.items()}
    command = ["bash", str(EXAMPLES / task / name), *map(str, arguments)]
    return run(command, environment)


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_text_to_image(tmp_path):
    output = tmp_path / "out" / "picture.png"
    small = ("--height", 64, "--width", 96, "--num-inference-steps", 2, "--seed", 1)
    with served("text_to_image") as environment:
        told = client(
            "text_to_image",
            environment,
            *("--prompt", "a red circle", "--negative-prompt", "blurry", "--cfg-scale", 3.0),
            *(*small, "--num-images-per-prompt", 2, "--output", output),
        )
        script(
            *("text_to_image", "run_curl_text_to_image.sh", environment),
            **{"PROMPT": 'a "red" circle', "SIZE": "96x64", "STEPS": 2, "SEED": 1, "OUTPUT": tmp_path / "curl.png"},
        )
    assert "classifier-free, scale 3" in told
    sizes = [size_of(path) for path in (output.with_stem("picture_0"), output.with_stem("picture_1"))]
    assert sizes == [(96, 64), (96, 64)]
    assert size_of(tmp_path / "curl.png") == (96, 64)


def test_image_to_image(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    with served("image_to_image", tiny_flux.flux_kontext(tmp_path / "model")) as environment:
        client(
            "image_to_image",
            environment,
            *(
                "--image",
                tmp_path / "red.png",
                "--prompt",
                "a cat",
                "--guidance-scale",
                2.5,
                "--num-inference-steps",
                1,
            ),
            *("--height", 64, "--width", 96, "--output", tmp_path / "edited.png"),
        )
        script(
            *("image_to_image", "run_curl_image_edit.sh", environment, tmp_path / "red.png", "a cat; a hat"),
            **{"SIZE": "96x64", "STEPS": 1, "OUTPUT": tmp_path / "curl.png"},
        )
        with pytest.raises(AssertionError, match="must be a multiple of"):
            script(
                *("image_to_image", "run_curl_image_edit.sh", environment, tmp_path / "red.png", "a cat"),
                **{"SIZE": "95x64", "OUTPUT": tmp_path / "refused.png"},
            )
    assert not (tmp_path / "refused.png").exists()
    assert size_of(tmp_path / "edited.png") == size_of(tmp_path / "curl.png") == (96, 64)


def test_text_to_video(tmp_path):
    model = tiny_wan.wan_t2v(tmp_path / "model")
    with served("text_to_video", model, VLLM_OMNI_API_KEY="SECRET") as environment:
        with pytest.raises(AssertionError, match="the key is missing or wrong"):
            script("text_to_video", "run_curl_text_to_video.sh", environment)
        client(
            "text_to_video",
            environment,
            *(
                "--api-key",
                "SECRET",
                "--prompt",
                "a cat",
                "--negative-prompt",
                "blurry",
                "--height",
                32,
                "--width",
                48,
                "--num-frames",
                5,
            ),
            *("--fps", 8, "--num-inference-steps", 2, "--guidance-scale", 4, "--output", tmp_path / "video.mp4"),
        )
        told = script(
            *("text_to_video", "run_curl_text_to_video.sh", environment),
            **{"SIZE": "48x32", "SECONDS_LONG": 0.3, "STEPS": 2, "OUTPUT": tmp_path / "curl.mp4", "API_KEY": "SECRET"},
        )
    assert "completed, 100 %" in told
    for name in ("video.mp4", "curl.mp4"):
        with av.open(str(tmp_path / name)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (48, 32)
            assert len(list(container.decode(stream))) == 5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.sh")), ids=lambda path: path.name)
def test_a_readme_names_every_file(path):
    assert path.name in (path.parent / "README.md").read_text()
