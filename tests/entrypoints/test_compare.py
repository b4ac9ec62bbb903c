from __future__ import annotations

import base64
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from PIL import Image

from tests import tiny_wan
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.entrypoints.cli import compare
from vllm_omni.entrypoints.cli.compare_engines import Call, check_parameters, diffusers_arguments
from vllm_omni.entrypoints.cli.compare_measure import _measure_alone
from vllm_omni.entrypoints.cli.compare_report import html_report
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.omni import SHIPPED_MODELS
from vllm_omni.errors import ComparisonError, InvalidRequestError

SMALL = ["--size", "48x32", "--steps", "2", "--num-trials", "2"]
PROMPTS = ["--prompt", "a cat", "--prompt", "a <red> | circle", "--negative-prompt", "blurry", "--true-cfg-scale", "3"]


@pytest.fixture(scope="module")
def report(qwen_folder, tmp_path_factory):
    """The folder of one comparison: two prompts, two outputs each."""
    folder = tmp_path_factory.mktemp("comparison")
    command = ["compare", str(qwen_folder), "--against", "diffusers", *PROMPTS, *SMALL, "--n", "2", "--seed", "5"]
    assert main([*command, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(report):
    return json.loads((report / "results.json").read_text())


def test_both_engines_are_given_the_same_work_and_make_the_same_pictures(results):
    assert [(output["prompt"], output["seed"]) for output in results["outputs"]] == [(0, 5), (0, 6), (1, 5), (1, 6)]
    for output in results["outputs"]:
        assert output["identical"] or output["psnr_db"] > 45
        assert output["ssim"] > 0.99
    parameters = results["prompts"][0]["parameters"]
    assert (parameters["width"], parameters["height"], parameters["num_inference_steps"]) == (48, 32, 2)
    assert parameters["true_cfg_scale"] == 3.0
    assert results["prompts"][1]["negative_prompt"] == "blurry"


def test_each_engine_has_its_figures(results):
    for engine in results["engines"].values():
        assert [len(trials) for trials in engine["seconds"]] == [2, 2]
        assert 0 < engine["min_s"] <= engine["median_s"] <= engine["p90_s"] <= engine["max_s"]
        assert engine["outputs_per_s"] > 0
        assert engine["peak_memory_bytes"] is None, "two engines in one process"
    medians = [results["engines"][name]["median_s"] for name in ("vllm-omni", "diffusers")]
    assert results["latency_ratio"] == medians[0] / medians[1]
    assert results["environment"]["versions"]["diffusers"]


def test_the_html_report_needs_nothing_but_itself(report):
    text = (report / "report.html").read_text()
    assert "a &lt;red&gt; | circle" in text
    assert "<script" not in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) == 4 * 3, "both pictures and their difference, for each output"
    for address in addresses:
        assert address.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
            assert picture.size == (48, 32)
    assert "http://" not in text
    assert "https://" not in text
    assert "color-scheme: light dark" in text


def test_the_html_report_shows_the_pictures_that_were_worked_on(results):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, format="JPEG")
    text = html_report({**results, "outputs": []}, [], [picture.getvalue()])
    assert text.count('src="data:image/png;base64,') == 1
    assert "<figcaption>input 1</figcaption>" in text


def test_the_markdown_report_points_to_the_pictures_beside_it(report):
    text = (report / "report.md").read_text()
    assert "a <red> | circle" in text
    paths = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(paths) == 4 * 2
    for path in paths:
        with Image.open(report / path) as picture:
            assert picture.size == (48, 32)
    for line in text.splitlines():
        if line.startswith("| vllm-omni |") or line.startswith("| diffusers |"):
            assert "shared process" in line or line.count("|") == 3


def test_videos_are_compared_frame_by_frame(tmp_path, capsys):
    folder = tiny_wan.wan_t2v(tmp_path / "model")
    command = ["compare", str(folder), "--prompt", "a cat", "--num-frames", "5", "--fps", "8", *SMALL]
    assert main([*command, "--num-trials", "1", "--num-warmup", "0", "--output-dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert str(tmp_path / "out" / "report.html") in captured.out
    assert "Loading" not in captured.err
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count('src="data:video/mp4;base64,') == 3
    (output,) = json.loads((tmp_path / "out" / "results.json").read_text())["outputs"]
    assert output["identical"] or output["psnr_db"] > 45
    assert (tmp_path / "out" / "outputs" / "prompt1-seed0-diffusers.mp4").exists()


def test_videos_that_are_not_packed_along_time_have_the_same_number_of_frames(tmp_path):
    command = ["compare", str(SHIPPED_MODELS["text-to-video"]), "--size", "32x32", "--num-frames", "2", "--steps", "1"]
    assert main([*command, "--num-trials", "1", "--num-warmup", "0", "--output-dir", str(tmp_path)]) == 0
    (output,) = json.loads((tmp_path / "results.json").read_text())["outputs"]
    assert output["identical"] or output["psnr_db"] > 45


@pytest.mark.slow
def test_engines_in_processes_of_their_own_tell_their_memory_apart(qwen_folder, tmp_path):
    command = ["compare", str(qwen_folder), "--prompt", "a cat", "--isolate", *SMALL, "--output-dir", str(tmp_path)]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["isolated"]
    assert all(engine["peak_memory_bytes"] > 0 for engine in results["engines"].values())
    assert results["outputs"][0]["identical"] or results["outputs"][0]["psnr_db"] > 45


def test_the_memory_of_ranks_in_other_processes_counts():
    engine = SimpleNamespace(load_s=0.0, peak_memory_bytes=1 << 60, facts=dict)
    workload = SimpleNamespace(prompts=(), num_trials=1, num_warmup=0)
    config = SimpleNamespace(torch_device=torch.device("cpu"))
    assert _measure_alone(config, workload, engine).peak_memory_bytes == 1 << 60


@pytest.mark.slow
def test_an_error_in_a_process_of_its_own_is_one_line(qwen_folder, tmp_path, capsys):
    # The length of a text is known to the tokenizer alone.
    command = ["compare", str(qwen_folder), "--isolate", "--max-sequence-length", "1", "--output-dir", str(tmp_path)]
    assert main(command) == 2
    assert "max_sequence_length" in capsys.readouterr().err


def edited_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_model_that_diffusers_does_not_know_is_refused_before_anything_loads(
    qwen_folder, tmp_path, capsys, monkeypatch
):
    registered = registry._DIFFUSION_MODELS
    monkeypatch.setitem(registered, "NoSuchPipeline", registered["QwenImagePipeline"])
    folder = edited_index(shutil.copytree(qwen_folder, tmp_path / "model"), _class_name="NoSuchPipeline")
    assert main(["compare", str(folder), "--output-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "has no pipeline class NoSuchPipeline, which model_index.json names" in message
    assert message.count("\n") == 1


def test_a_model_that_diffusers_cannot_load_is_one_error_with_its_reason(qwen_folder, tmp_path, capsys):
    folder = shutil.copytree(qwen_folder, tmp_path / "model")
    edited_index(folder, scheduler=["diffusers", "NoSuchScheduler"])
    assert main(["compare", str(folder), *SMALL, "--output-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"cannot load {folder}" in message
    assert "NoSuchScheduler" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance-scale-2", "3"], "guidance_scale_2: diffusers' QwenImagePipeline has no such parameter"),
        (["--extra-args", '{"layers": 3}'], "extra_args: diffusers' QwenImagePipeline has no such parameter"),
        (["--load-format", "dummy"], "load_format='dummy': two engines have the same weights only if"),
        (["--reference-attention", "nativ"], "no attention backend of diffusers; did you mean 'native'?"),
        (["--image", "nowhere.png"], "--image nowhere.png cannot be read"),
        (["--size", "33x32"], "width=33 must be a multiple of"),
        (["--n", "300"], "num_outputs_per_prompt=300 must lie between 1 and 256"),
        (["--true-cfg-scale", "4"], "true_cfg_scale=4.0 needs a negative prompt"),
        (["--image", __file__], "image: diffusers' QwenImagePipeline has no such parameter"),
    ],
)
def test_bad_input_is_refused_before_anything_loads(qwen_folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(DiffusersPipelineLoader, "load_model", None)
    assert main(["compare", str(qwen_folder), *arguments, "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_before_anything_loads(qwen_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compare", str(qwen_folder), "--output-dir", str(tmp_path / "file")]) == 2
    assert f"--output-dir {tmp_path / 'file' / 'report.html'} cannot be written: " in capsys.readouterr().err


def test_the_options_of_this_engine_are_in_the_reports(qwen_folder, tmp_path):
    options = ["--cache-backend", "tea_cache", "--cache-config", '{"rel_l1_thresh": 0.3}']
    once = ["--num-trials", "1", "--num-warmup", "0", "--output-dir", str(tmp_path)]
    assert main(["compare", str(qwen_folder), "--size", "48x32", "--steps", "2", *options, *once]) == 0
    kept = {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0.3}}
    assert json.loads((tmp_path / "results.json").read_text())["options"] == kept
    assert "| cache_config | {'rel_l1_thresh': 0.3} |" in (tmp_path / "report.md").read_text()


def test_a_revision_chooses_the_folder_and_nothing_else(qwen_folder, tmp_path, monkeypatch):
    found = []

    def resolve(model, revision, *, weights=True):
        found.append((model, revision))
        return qwen_folder

    monkeypatch.setattr("vllm_omni.diffusion.engine.configure.resolve_model_folder", resolve)
    once = ["--num-trials", "1", "--num-warmup", "0", "--output-dir", str(tmp_path)]
    assert main(["compare", "some/model", "--revision", "v1", "--size", "48x32", "--steps", "2", *once]) == 0
    assert set(found) == {("some/model", "v1"), (str(qwen_folder), None)}


@pytest.mark.parametrize("arguments", [["--num-trials", "0"], ["--against", "others"], ["--num-warmup", "x"]])
def test_counts_and_names_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    assert arguments[0] in capsys.readouterr().err


def call(**parameters):
    return Call(texts={"prompt": "a cat"}, images=(), parameters=parameters, seeds=(0,))


def test_parameters_are_handed_to_diffusers_under_its_names():
    arguments = diffusers_arguments(FluxPipeline, call(num_outputs_per_prompt=2, height=32, guidance_scale=3.0, fps=8))
    assert arguments == {"prompt": "a cat", "num_images_per_prompt": 2, "height": 32, "guidance_scale": 3.0}


def test_a_resolved_parameter_that_diffusers_lacks_is_an_error():
    with pytest.raises(InvalidRequestError, match="num_frames: diffusers' FluxPipeline has no such") as caught:
        diffusers_arguments(FluxPipeline, call(num_frames=5))
    assert caught.value.param == "num_frames"
    with pytest.raises(InvalidRequestError, match="num_frames"):
        check_parameters(QwenImagePipeline, [{"prompt": "a cat"}], {"num_frames": 5})


def test_outputs_of_unlike_sizes_are_not_compared():
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))
    with pytest.raises(ComparisonError, match="cannot be compared"):
        compare._paired([[small]], [[large]])
