"""What happens before the first request: warm-up, compiled code on disk, and reading ahead in weight files."""

from __future__ import annotations

import argparse
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny_qwen_edit, tiny_wan
from tests.diffusion.cache.toy import Toy
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.compile import apply_compile
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.engine import warm_up
from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.diffusion.model_loader import weights
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image_edit
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.cli import serve
from vllm_omni.errors import InvalidConfigError, WeightsError


@pytest.fixture
def validated(monkeypatch):
    """The requests that the engine was given."""
    requests, validate = [], Engine.validate

    def record(engine, prompt, params):
        requests.append(validate(engine, prompt, params))
        return requests[-1]

    monkeypatch.setattr(Engine, "validate", record)
    return requests


def asked_for(requests):
    params = [request.sampling_params for request in requests]
    return [(each.width, each.height, each.num_frames, each.num_outputs_per_prompt) for each in params]


def test_each_size_runs_as_one_output_and_as_two(qwen_folder, validated):
    with Omni(str(qwen_folder), warmup_sizes=["64x32", "32x32"]) as omni:
        assert asked_for(validated) == [(64, 32, None, 1), (64, 32, None, 2), (32, 32, None, 1), (32, 32, None, 2)]
        assert not omni._engine.has_requests
        params = OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=1, seed=0)
        assert omni.generate("a red circle", params)[0].finished


def test_an_edit_model_gets_a_picture_and_a_video_model_frames(tmp_path, validated, monkeypatch):
    monkeypatch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", 128 * 128)  # the size of what it gets is no matter
    with Omni(str(tiny_qwen_edit.qwen_image_edit(tmp_path / "edit")), warmup_sizes=["64x64"]):
        assert asked_for(validated) == [(64, 64, None, 1), (64, 64, None, 2)]
    validated.clear()
    with Omni(str(tiny_wan.wan_t2v(tmp_path / "wan")), warmup_sizes=["32x32x5"]):
        assert asked_for(validated) == [(32, 32, 5, 1), (32, 32, 5, 2)]


def test_a_server_that_compiles_warms_up_the_size_of_the_model(qwen_folder, monkeypatch):
    sizes = []
    monkeypatch.setattr(warm_up, "_run", lambda engine, size, num_outputs: sizes.append((size, num_outputs)))
    own = (None, None, None)
    for options, expected in (
        ({"enforce_eager": False}, [(own, 1), (own, 2)]),
        ({"enforce_eager": False, "warmup_sizes": []}, []),
        ({}, []),
        ({"warmup_sizes": ["64x64"]}, [((64, 64, None), 1), ((64, 64, None), 2)]),
    ):
        sizes.clear()
        AsyncOmni(str(qwen_folder), **options).close()
        assert sizes == expected
    sizes.clear()
    Omni(str(qwen_folder), enforce_eager=False).close()
    assert sizes == []


@pytest.mark.parametrize("size", ["64", "64x", "0x64", "64x64x0", "axb", 64, "64x64x5x5"])
def test_what_is_no_size_is_refused(size, qwen_folder):
    with pytest.raises(InvalidConfigError, match=r"warmup_sizes: .* must be WIDTHxHEIGHT") as caught:
        Omni(str(qwen_folder), warmup_sizes=[size])
    assert caught.value.option == "warmup_sizes"
    with pytest.raises(InvalidConfigError, match="must be a list of sizes"):
        Omni(str(qwen_folder), warmup_sizes="64x64")


@pytest.mark.parametrize(("size", "reason"), [("63x64", "width=63 must be a multiple"), ("64x64x5", "num_frames=5")])
def test_a_size_that_the_model_does_not_take_is_refused(size, reason, qwen_folder):
    with pytest.raises(InvalidConfigError, match=rf"warmup_sizes: {size}.*: {reason}"):
        Omni(str(qwen_folder), warmup_sizes=[size])


def test_sizes_of_the_command_line():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args(["--warmup-sizes", "1024x1024, 832x480x81"])
    assert arguments.warmup_sizes == ["1024x1024", "832x480x81"]
    assert parser.parse_args(["--warmup-sizes", ""]).warmup_sizes == []


def test_compiled_code_goes_to_the_folder(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    config = OmniDiffusionConfig.from_options(
        model="m", model_class_name="", device="cpu", enforce_eager=False, compile_cache_dir=str(tmp_path)
    )
    apply_compile(Toy(), config)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    with pytest.raises(InvalidConfigError, match="compile_cache_dir=7 must be the path of a folder"):
        OmniDiffusionConfig.from_options(model="m", model_class_name="", device="cpu", compile_cache_dir=7)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Two files of ten tensors each, as for a GPU; without one there is no memory that it could copy from."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(weights, "_pinned", lambda file, name: file.get_tensor(name).clone())
    files = []
    for shard in range(2):
        files.append(tmp_path / f"{shard}.safetensors")
        save_file({f"{shard}.{index}": torch.full((3,), 10.0 * shard + index) for index in range(10)}, files[-1])
    return SimpleNamespace(files=files, device=torch.device("cuda"))


@pytest.mark.parametrize("num_readers", [1, 3, 30])
def test_reading_ahead_keeps_order_and_values(num_readers, shards):
    plain = dict(weights.iterate_weights(shards.files))
    ahead = list(weights.iterate_weights(shards.files, shards.device, num_readers))
    assert [name for name, _ in ahead] == list(plain)
    assert len(ahead) == 20
    for name, tensor in ahead:
        torch.testing.assert_close(tensor, plain[name])


def test_reading_ahead_may_stop_early(shards):
    reading = weights.iterate_weights(shards.files, shards.device, 4)
    assert next(reading)[0] == "0.0"
    reading.close()


def test_what_a_reader_raises_names_the_file(shards, monkeypatch):
    def fail(file, name):
        raise OSError("input/output error")

    monkeypatch.setattr(weights, "_pinned", fail)
    with pytest.raises(WeightsError, match=r"0\.safetensors is damaged or truncated \(input/output error\)"):
        list(weights.iterate_weights(shards.files, shards.device))
