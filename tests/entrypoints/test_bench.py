from __future__ import annotations

import json

import pytest

from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.entrypoints.cli import bench
from vllm_omni.entrypoints.cli.main import main


def test_latency_is_measured_for_each_batch_size(qwen_folder, tmp_path, capsys):
    path = tmp_path / "latency.json"
    command = ["bench", "latency", "--model", str(qwen_folder), "--batch-size", "1", "3", "--steps", "2"]
    command += ["--size", "48x32", "--num-warmup", "0", "--num-trials", "2", "--output-json", str(path)]
    assert main(command) == 0
    summary, header, *rows = capsys.readouterr().out.splitlines()
    assert "48 x 32, 2 steps, float32 on " in summary
    assert header.split() == ["batch", "median", "s", "p90", "s", "outputs/s", "s/step", "peak", "GiB"]
    assert [row.split()[0] for row in rows] == ["1", "3"]
    results = json.loads(path.read_text())
    assert [batch["num_outputs"] for batch in results["batches"]] == [1, 3]
    for batch in results["batches"]:
        assert len(batch["seconds"]) == 2
        assert 0 < batch["seconds_per_step"] < batch["median_s"] <= batch["p90_s"]
    assert results["receipt"]["seeds"] == [0]
    assert results["environment"]["versions"]["torch"]


def test_each_batch_says_what_accelerated_it_and_the_options_are_kept(qwen_folder, tmp_path, capsys):
    path = tmp_path / "latency.json"
    command = ["bench", "latency", "--model", str(qwen_folder), "--batch-size", "1", "2", "--steps", "4"]
    command += ["--size", "48x32", "--num-warmup", "0", "--num-trials", "1", "--output-json", str(path)]
    options = {"rel_l1_thresh": 1, "coefficients": [0.001, 0]}
    command += ["--cache-backend", "tea_cache", "--cache-config", json.dumps(options)]
    assert main(command) == 0
    results = json.loads(path.read_text())
    assert [row["accelerations"] for row in results["batches"]] == [["tea_cache: skipped 2 of 4 forwards"]] * 2
    assert results["options"] == {"cache_backend": "tea_cache", "cache_config": options}
    assert capsys.readouterr().out.count("tea_cache: skipped 2 of 4 forwards") == 1


def test_a_batch_that_was_accelerated_otherwise_is_said():
    rows = [{"batch_size": 1, "accelerations": ["torch.compile"]}, {"batch_size": 8, "accelerations": []}]
    assert bench._accelerations(rows) == "batch 1: torch.compile; batch 8: no accelerations"


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "latency.json"
    assert main(["bench", "latency", "--model", "/nowhere/at/all", "--output-json", str(path)]) == 2
    assert f"--output-json {path} cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", "5"], "num_frames=5 is not a parameter of this model"),
        (["--image", "nowhere.png"], "--image nowhere.png cannot be read"),
        (["--size", "33"], "height=33 must be a multiple of"),
    ],
)
@pytest.mark.parametrize("command", [["bench", "latency"], ["generate", "a cat"]])
def test_bad_input_is_one_line_that_names_it_before_anything_loads(
    qwen_folder, tmp_path, capsys, monkeypatch, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusersPipelineLoader, "load_model", None)
    assert main([*command, "--model", str(qwen_folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("arguments", [[], ["throughput"], ["latency", "--batch-size", "0"]])
def test_what_is_to_be_measured_must_be_named(arguments):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
