"""The options of the step caches, what they are refused for, and what the receipt says of them."""

from __future__ import annotations

import json
import shutil

import pytest
from torch import nn

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.cache import EXTRACTOR_REGISTRY, extractors, register_extractor
from vllm_omni.diffusion.cache.extractors import published_coefficients
from vllm_omni.diffusion.data import CacheConfig
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.registry import _DIFFUSION_MODELS, register_diffusion_model
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError

PARAMS = OmniDiffusionSamplingParams(seed=1, num_inference_steps=4, height=64, width=64, output_type="latent")
GUIDED = {"prompt": "a red circle", "negative_prompt": "blurry"}


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tea_cache", {"rel_l1_tresh": 0.2}, r"unknown key 'rel_l1_tresh'; did you mean 'rel_l1_thresh'\?"),
        ("cache_dit", {"Fn_compute_block": 1}, r"did you mean 'Fn_compute_blocks'\?"),
        ("tea_cache", {"rel_l1_thresh": -0.1}, "rel_l1_thresh=-0.1 must be a number of at least 0"),
        ("tea_cache", {"rel_l1_thresh": 1.1}, "rel_l1_thresh=1.1 must be at most 1: .*as much as it is"),
        ("tea_cache", {"rel_l1_thresh": float("nan")}, "rel_l1_thresh=nan must be"),
        ("tea_cache", {"rel_l1_thresh": "0.2"}, "rel_l1_thresh='0.2' must be"),
        ("tea_cache", {"rel_l1_thresh": True}, "rel_l1_thresh=True must be"),
        ("tea_cache", {"coefficients": []}, r"coefficients=\[\] must be a list of numbers"),
        ("tea_cache", {"coefficients": [1, "x"]}, "coefficients=.* must be a list of finite numbers"),
        ("cache_dit", {"residual_diff_threshold": -1}, "residual_diff_threshold=-1 must be"),
        ("cache_dit", {"Fn_compute_blocks": 0}, "Fn_compute_blocks=0 must be an integer of at least 1"),
        ("cache_dit", {"Bn_compute_blocks": 1.5}, "Bn_compute_blocks=1.5 must be an integer"),
        ("cache_dit", {"max_warmup_steps": -1}, "max_warmup_steps=-1 must be"),
        ("cache_dit", {"max_continuous_cached_steps": -2}, "max_continuous_cached_steps=-2 must be"),
        ("cache_dit", {"taylorseer_order": 2}, "taylorseer_order=2 must be 1"),
        ("cache_dit", {"enable_taylorseer": 1}, "enable_taylorseer=1 must be True or False"),
        ("cache_dit", {"scm_steps_mask_policy": "faster"}, "scm_steps_mask_policy='faster' must be one of 'slow'"),
        ("cache_dit", {"scm_steps_policy": "static"}, "scm_steps_policy='static' must be"),
        ("cache_dit", [1], r"cache_config=\[1\] must be a dict"),
        (None, {"rel_l1_thresh": 0.2}, "needs cache_backend, one of tea_cache, cache_dit"),
        # Both caches at once.
        (
            "tea_cache",
            {"Fn_compute_blocks": 1},
            "an option of cache_backend='cache_dit', beside .* runs with one cache",
        ),
        ("cache_dit", {"rel_l1_thresh": 0.2}, "an option of cache_backend='tea_cache', beside .* runs with one cache"),
    ],
)
def test_options_that_are_not_sound_are_refused_by_name(qwen_folder, backend, options, message):
    with pytest.raises(InvalidConfigError, match=message) as caught:
        configure(str(qwen_folder), {"cache_backend": backend, "cache_config": options})
    assert caught.value.option == "cache_config"


@pytest.mark.parametrize("backend", ["teacache", "tea_cache,cache_dit", ["tea_cache", "cache_dit"], ""])
def test_a_backend_is_one_of_those_that_there_are(qwen_folder, backend):
    with pytest.raises(InvalidConfigError, match="must be one of tea_cache, cache_dit") as caught:
        configure(str(qwen_folder), {"cache_backend": backend})
    assert caught.value.option == "cache_backend"


def test_a_configuration_does_not_follow_the_callers_dict():
    options = {"rel_l1_thresh": 0.3}
    config = CacheConfig(cache_backend="tea_cache", cache_config=options)
    options["rel_l1_thresh"] = -1
    assert config.step_cache.rel_l1_thresh == 0.3


def test_blocks_that_are_always_computed_must_leave_one_to_skip(qwen_folder):
    options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1}
    with pytest.raises(InvalidConfigError, match="leave none of the 2 blocks of QwenImageTransformer2DModel"):
        Omni(str(qwen_folder), cache_backend="cache_dit", cache_config=options)


@pytest.fixture
def foreign(qwen_folder, tmp_path, monkeypatch):
    """A checkpoint whose transformer nobody knows; loading it would be an error of the test."""

    def load_model(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(DiffusersPipelineLoader, "load_model", load_model)
    folder = shutil.copytree(qwen_folder, tmp_path / "foreign")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["elsewhere", "ForeignTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("backend", ["tea_cache", "cache_dit"])
def test_a_transformer_without_an_extractor_is_refused_before_weights_are_loaded(foreign, backend):
    message = "transformer of QwenImagePipeline is a ForeignTransformer, which has no extractor .*register_extractor"
    with pytest.raises(FeatureNotAvailableError, match=message):
        Omni(str(foreign), cache_backend=backend)


def test_a_registered_extractor_makes_a_transformer_known(foreign, monkeypatch):
    monkeypatch.setattr(extractors, "EXTRACTOR_REGISTRY", EXTRACTOR_REGISTRY)
    register_extractor("ForeignTransformer", extractors.stages, coefficients=[2.0, 0.0])
    try:
        with pytest.raises(AssertionError, match="the weights were loaded"):
            Omni(str(foreign), cache_backend="tea_cache")
        assert published_coefficients("ForeignTransformer", {}, 1) == (2.0, 0.0)
    finally:
        del EXTRACTOR_REGISTRY["ForeignTransformer"], extractors.POLYNOMIALS["ForeignTransformer"]


class WholePipeline(nn.Module):
    def forward(self, req):
        raise AssertionError("never run")


def test_a_pipeline_that_runs_in_one_piece_is_refused(foreign):
    register_diffusion_model("QwenImagePipelineWhole", f"{__name__}:WholePipeline")
    index = json.loads((foreign / "model_index.json").read_text()) | {"_class_name": "QwenImagePipelineWhole"}
    (foreign / "model_index.json").write_text(json.dumps(index))
    try:
        with pytest.raises(FeatureNotAvailableError, match="runs in one piece"):
            Omni(str(foreign), cache_backend="tea_cache")
    finally:
        del _DIFFUSION_MODELS["QwenImagePipelineWhole"]


def test_coefficients_go_with_the_transformer_that_they_were_fitted_for():
    small, large = {"num_attention_heads": 12, "in_channels": 16}, {"num_attention_heads": 40, "in_channels": 16}
    assert published_coefficients("FluxTransformer2DModel", {}, 1)[-1] == 0.264230861
    assert published_coefficients("WanTransformer3DModel", small, 1)[0] == -52186.2437
    assert published_coefficients("WanTransformer3DModel", large, 1)[0] == -303318.725
    assert published_coefficients("WanTransformer3DModel", large, 2) is None
    assert published_coefficients("WanTransformer3DModel", large | {"in_channels": 36}, 1) is None


def test_the_receipt_says_which_cache_and_how_much_it_skipped(qwen_folder):
    options = {"rel_l1_thresh": 1, "coefficients": [1e-9, 0]}
    with Omni(str(qwen_folder), cache_backend="tea_cache", cache_config=options) as omni:
        guided, plain = omni.generate([GUIDED, "a red circle"], PARAMS)
    assert (guided.receipt.step_cache.num_forwards, guided.receipt.step_cache.num_skipped) == (8, 4)
    assert guided.receipt.accelerations == ("tea_cache: skipped 4 of 8 forwards",)
    assert plain.receipt.accelerations == ("tea_cache: skipped 2 of 4 forwards",)


def test_a_cache_that_never_hits_is_visible_and_one_that_is_off_is_not_there(qwen_folder, qwen_omni):
    with Omni(str(qwen_folder), cache_backend="cache_dit") as omni:
        (output,) = omni.generate("a red circle", PARAMS)
    assert output.receipt.accelerations == ("cache_dit: skipped 0 of 4 forwards",)
    (uncached,) = qwen_omni.generate("a red circle", PARAMS)
    assert (uncached.receipt.accelerations, uncached.receipt.step_cache) == ((), None)


def test_the_command_line_takes_the_options_as_json(qwen_folder, tmp_path, capsys):
    command = ["generate", "a cat", "--model", str(qwen_folder), "--size", "64", "--steps", "2"]
    command += ["--output", str(tmp_path / "cat.png"), "--cache-backend", "tea_cache", "--cache-config"]
    assert main([*command, '{"rel_l1_thresh": 0.3}']) == 0
    assert main([*command, '{"rel_thresh": 0.3}']) == 2
    assert "did you mean 'rel_l1_thresh'?" in capsys.readouterr().err
    for text in ("{", "[1]"):
        with pytest.raises(SystemExit):
            main([*command, text])
        assert "--cache-config" in capsys.readouterr().err
