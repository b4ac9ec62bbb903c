"""The mistakes of a model's author are errors that say what is wrong with the pipeline."""

from __future__ import annotations

import json

import pytest

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.registry import _DIFFUSION_MODELS, _DIFFUSION_POST_PROCESS_FUNCS, register_diffusion_model
from vllm_omni.errors import GenerationError, InvalidRequestError, UnsupportedPipelineError

MODULE = "tests.diffusion.careless"
TWO_STEPS = OmniDiffusionSamplingParams(num_inference_steps=2, output_type="pt")


@pytest.fixture
def load(tmp_path):
    """A function that registers a pipeline and loads it."""

    def load(class_name, target=None, **functions):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
        register_diffusion_model(class_name, target or f"{MODULE}:{class_name}", **functions)
        return Omni(str(tmp_path), device="cpu")

    before = dict(_DIFFUSION_MODELS)
    yield load
    for name in _DIFFUSION_MODELS.keys() - before.keys():
        del _DIFFUSION_MODELS[name]
        _DIFFUSION_POST_PROCESS_FUNCS.pop(name, None)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("prepare returns None", r"CarelessPipeline\.prepare returned None, no DenoiseState"),
        ("a condition is a list", r"condition 'sizes' cannot be compared .*unhashable type: 'list'.*such as a tuple"),
        (
            "predict drops a channel",
            r"CarelessPipeline\.predict returned a prediction of \(1, 2, 8, 8\) for latents of \(1, 3, 8, 8\)",
        ),
        ("predict returns None", r"CarelessPipeline\.predict returned NoneType for latents of \(1, 3, 8, 8\)"),
        ("decode returns None", r"CarelessPipeline\.decode returned None, no Tensor"),
    ],
)
def test_a_verb_that_returns_something_else_is_named(load, mistake, message):
    with load("CarelessPipeline") as omni:
        with pytest.raises(GenerationError, match=message):
            omni.generate(mistake, TWO_STEPS)
        assert omni.generate("no mistake", TWO_STEPS)[0].finished


def test_a_forward_that_returns_something_else_is_named(load):
    message = r"CarelessForward\.forward returned None, no DiffusionOutput"
    with load("CarelessForward") as omni, pytest.raises(GenerationError, match=message):
        omni.generate("a prompt", TWO_STEPS)


def test_steps_without_a_number_are_refused_at_the_door(load):
    with load("CarelessPipeline") as omni:
        with pytest.raises(InvalidRequestError, match="num_inference_steps is not set") as caught:
            omni.generate("no mistake", OmniDiffusionSamplingParams(output_type="pt"))
        assert caught.value.param == "num_inference_steps"
        by_levels = OmniDiffusionSamplingParams(sigmas=[1.0, 0.6, 0.3], output_type="pt")
        assert omni.generate("no mistake", by_levels)[0].metrics.num_steps == 3


@pytest.mark.parametrize(
    ("target", "functions", "message"),
    [
        (
            "no_such_package.model:Pipeline",
            {},
            r"'no_such_package\.model:Pipeline', which cannot be imported: No module",
        ),
        (
            f"{MODULE}s:CarelessPipeline",
            {},
            r"'tests\.diffusion\.carelesss:CarelessPipeline', which cannot be imported",
        ),
        (
            f"{MODULE}:CarefulPipeline",
            {},
            r"registered with CarefulPipeline, which tests\.diffusion\.careless does not",
        ),
        (f"{MODULE}:CarelessPipeline", {"post_process_func": "no_such"}, "registered with no_such, which"),
    ],
)
def test_what_is_registered_and_not_there_is_named(load, target, functions, message):
    with pytest.raises(UnsupportedPipelineError, match=f"^CarelessPipeline is .*{message}"):
        load("CarelessPipeline", target, **functions)
