from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import pytest
from PIL import Image

from tests import tiny_wan
from vllm_omni.entrypoints.cli import generate as generate_command
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.version import __version__


@pytest.fixture
def generate(qwen_folder, tmp_path, monkeypatch, capsys):
    """Run ``vllm-omni generate`` on the tiny checkpoint in a folder of its own: (status, standard output, error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        command = ["generate", "a cat", "--model", str(qwen_folder), "--size", "48x32", "--steps", "2", *arguments]
        status = main(command)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_picture_is_written_where_the_last_lines_say(generate, tmp_path):
    status, out, err = generate("--output", "deep/er/cat.webp", "--seed", "3")
    assert (status, err) == (0, "")
    path, summary = out.splitlines()
    assert path == "deep/er/cat.webp"
    assert summary.startswith("48 x 32, 2 steps, seed 3: ")
    with Image.open(tmp_path / path) as picture:
        assert (picture.size, picture.format) == ((48, 32), "WEBP")


def test_without_a_name_the_seed_names_the_file_and_several_are_numbered(generate, tmp_path):
    assert generate("--seed", "5")[1].splitlines()[0] == "vllm-omni-5.png"
    _, out, _ = generate("--seed", "5", "--n", "2", "--negative-prompt", "blurry", "--true-cfg-scale", "2")
    assert out.splitlines()[:2] == ["vllm-omni-5-0.png", "vllm-omni-5-1.png"]
    assert (tmp_path / "vllm-omni-5-1.png").exists()


def test_a_cache_that_never_hits_is_said(generate):
    _, out, _ = generate("--cache-backend", "tea_cache", "--cache-config", '{"rel_l1_thresh": 0.001}')
    assert out.splitlines()[-1].endswith("in float32; tea_cache: skipped 0 of 2 forwards")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--output", "cat.gif"], 2, "must end in .png"),
        (["--height", "64"], 2, "--size and --height exclude each other"),
        (["--num-frames", "5"], 2, "num_frames=5 is not a parameter of this model"),
        (["--enable-cpu-offload"], 1, "CPU offload is not available yet"),
        (["--seed", "-1"], 2, "seed=-1 must lie between 0 and"),
        (["--extra-args", '{"layers": 3}'], 2, "extra_args: this model has no parameter 'layers'"),
    ],
)
def test_bad_input_is_one_line_that_names_it(generate, arguments, status, message):
    result = generate(*arguments)
    assert (result[0], result[1]) == (status, "")
    assert message in result[2]
    assert result[2].count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colour=red"], "unknown option --colour=red; --help lists all options"),
        (["--negativ-promt", "blurry"], "unknown option --negativ-promt; did you mean --negative-prompt?"),
        (["--stesp", "4"], "unknown option --stesp; did you mean --steps?"),
        (["--extra-args", "layers=3"], "argument --extra-args: 'layers=3' is no JSON"),
        (["--extra-args", "[3]"], "argument --extra-args: '[3]' is no JSON object"),
        (["on", "a", "mat"], "unexpected 'on'; text of several words goes in quotes"),
    ],
)
def test_an_argument_that_is_not_known_gets_advice(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a cat", *arguments])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("usage: vllm-omni generate")


def test_a_file_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("file/cat.png", "file/deep/er/cat.png"):
        assert main(["generate", "a cat", "--model", "/nowhere/at/all", "--output", str(tmp_path / name)]) == 2
        shown = capsys.readouterr().err
        assert f"--output {tmp_path / name} cannot be written: " in shown
        assert shown.count("\n") == 1


def test_a_disk_that_is_full_is_one_line(generate, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    status, _, err = generate("--output", "cat.png")
    assert (status, err.count("\n")) == (2, 1)
    assert "--output cat.png cannot be written: No space left on device" in err


def test_an_interrupt_is_one_word_at_any_time(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["generate", "a cat"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_that_a_finalizer_swallows_is_not_lost(monkeypatch, capsys):
    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    def load(*_):
        Interrupted()
        time.sleep(5)

    monkeypatch.setattr("importlib.import_module", load)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert main(["generate", "a cat"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "interrupted\n"


def test_a_picture_for_a_model_of_texts_is_refused_with_what_the_model_does(generate, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "red.png")
    status, _, err = generate("--image", "red.png")
    assert status == 2
    assert "takes no picture (multi_modal_data); it does text-to-image. Leave the picture out, or choose a task" in err


def test_a_model_that_is_not_there_is_one_line(capsys):
    assert main(["generate", "a cat", "--model", "/nowhere/at/all"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_layers_without_a_background_are_laid_on_white_in_a_jpeg(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    output = SimpleNamespace(flat_images=[clear, clear], receipt=SimpleNamespace(seeds=(1,)))
    paths = generate_command._write(output, tmp_path / "layers.JPG", ".png")
    assert [path.name for path in paths] == ["layers-0.JPG", "layers-1.JPG"]
    with Image.open(paths[1]) as picture:
        assert (picture.format, picture.getpixel((4, 4))) == ("JPEG", (255, 255, 255))


def test_a_picture_becomes_a_video_that_plays(tmp_path, capsys, monkeypatch):
    model = tiny_wan.wan_i2v(tmp_path / "model")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    command = ["generate", "a cat", "--model", str(model), "--steps", "2", "--num-frames", "5", "--fps", "8"]
    command += ["--image", str(tmp_path / "red.png"), "--size", "48x32", "--seed", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(generate_command, "Omni", lambda *_, **__: pytest.fail("it is known before the model is loaded"))
        assert main([*command, "--output", str(tmp_path / "cat.png")]) == 2
    assert "must end in .mp4" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "cat.mp4")]) == 0
    assert "48 x 32 x 5 frames, 2 steps, seed 1" in capsys.readouterr().out
    with av.open(str(tmp_path / "cat.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5


def test_a_picture_that_cannot_be_read_is_one_line(generate):
    status, _, err = generate("--image", "nowhere.png")
    assert (status, err) == (2, "vllm-omni: error: --image nowhere.png cannot be read: No such file or directory\n")
    assert generate("--image", __file__)[0] == 2


@pytest.mark.parametrize("size", ["12by3", "x", "12x", "-4"])
def test_a_size_that_cannot_be_read_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a cat", "--size", size])
    assert "--size" in capsys.readouterr().err


def test_help_explains_and_hides_what_does_not_exist_yet(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--steps", "number of denoising steps", "--vae-use-tiling", "--dtype", "WxH"):
        assert text in shown
    assert "--tensor-parallel-size" in shown
    assert "--enable-cpu-offload" not in shown


def test_the_version_needs_no_torch():
    code = """
import sys
from vllm_omni.entrypoints.cli.main import main
try:
    main(["--version"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == f"vllm-omni {__version__}\n"
