from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import MAX_SEED, normalize_prompt


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 0),
        ("height", -64),
        ("width", 10**9),
        ("width", 64.0),
        ("width", True),
        ("num_inference_steps", 0),
        ("num_inference_steps", "many"),
        ("num_outputs_per_prompt", 0),
        ("num_outputs_per_prompt", 10**6),
        ("guidance_scale", math.nan),
        ("true_cfg_scale", math.inf),
        ("true_cfg_scale", -1.0),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.5),
        ("max_sequence_length", 0),
        ("num_frames", 0),
        ("fps", 0),
        ("sigmas", []),
        ("sigmas", [1.0, 1.0]),
        ("sigmas", [0.5, 0.9]),
        ("sigmas", [1.5, 0.5]),
        ("sigmas", [0.5, math.nan]),
        ("sigmas", "10"),
        ("timesteps", [1001.0]),
        ("timesteps", [0.0]),
        ("latents", [1.0]),
        ("generator", 3),
        ("output_type", "jpeg"),
        ("extra_args", [1]),
    ],
)
def test_a_value_that_no_model_takes_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        OmniDiffusionSamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"sigmas": [1.0], "timesteps": [1000.0]}, "timesteps"),
        ({"seed": 1, "generator": torch.Generator()}, "generator"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_values_that_exclude_each_other_are_refused(values, param):
    with pytest.raises(InvalidRequestError) as caught:
        OmniDiffusionSamplingParams(**values)
    assert caught.value.param == param


def test_an_unknown_parameter_is_refused_with_the_nearest_name():
    with pytest.raises(InvalidRequestError, match=r"'num_inference_step'; did you mean 'num_inference_steps'\?"):
        OmniDiffusionSamplingParams(num_inference_step=3)
    with pytest.raises(InvalidRequestError, match=r"'steps'; did you mean 'num_inference_steps'\?"):
        OmniDiffusionSamplingParams(steps=3)


def test_a_misspelt_assignment_is_refused_and_a_known_one_is_not():
    params = OmniDiffusionSamplingParams()
    with pytest.raises(InvalidRequestError, match=r"'heigth'; did you mean 'height'\?") as caught:
        params.heigth = 64
    assert caught.value.param == "heigth"
    params.height = 64
    assert params.height == 64


def test_zero_and_false_are_values():
    params = OmniDiffusionSamplingParams(seed=0, guidance_scale=0.0, true_cfg_scale=0)
    assert (params.seed, params.guidance_scale, params.true_cfg_scale) == (0, 0.0, 0)


def test_a_string_becomes_a_prompt():
    assert normalize_prompt("a cat") == {"prompt": "a cat"}
    assert normalize_prompt("") == {"prompt": ""}


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (3, "prompt"),
        (None, "prompt"),
        (["a"], "prompt"),
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"negative_prompt": "x"}, "prompt"),
        ({"promt": "x"}, "promt"),
        ({"prompt": "x", "negative_prompt": 1}, "negative_prompt"),
        ({"prompt": "x", "prompt_embeds": torch.ones(1, 2)}, "prompt_embeds"),
        ({"prompt": "x", "negative_prompt": "y", "negative_prompt_embeds": torch.ones(1, 2)}, "negative_prompt_embeds"),
        ({"prompt_embeds": torch.ones(2, 3, 4)}, "prompt_embeds"),
        ({"prompt_embeds": torch.ones(0, 4)}, "prompt_embeds"),
        ({"prompt_embeds": torch.ones(3, 4, dtype=torch.long)}, "prompt_embeds"),
        ({"prompt_embeds": [[1.0]]}, "prompt_embeds"),
        ({"prompt_embeds": torch.full((3, 4), float("nan"))}, "prompt_embeds"),
        ({"prompt": "x", "pooled_prompt_embeds": torch.full((4,), float("inf"))}, "pooled_prompt_embeds"),
        ({"prompt": "x", "multi_modal_data": []}, "multi_modal_data"),
    ],
)
def test_a_prompt_that_is_not_sound_is_refused_by_key(prompt, param):
    with pytest.raises(InvalidRequestError) as caught:
        normalize_prompt(prompt)
    assert caught.value.param == param


def test_an_unknown_prompt_key_is_refused_with_the_nearest_name():
    with pytest.raises(InvalidRequestError, match=r"did you mean 'negative_prompt'\?"):
        normalize_prompt({"prompt": "x", "negativ_prompt": "y"})


def test_numbers_of_numpy_become_numbers_of_python():
    params = OmniDiffusionSamplingParams(seed=np.int64(3), guidance_scale=np.float32(1.5))
    params.height = np.int32(64)
    params.validate()
    assert [(type(value), value) for value in (params.seed, params.guidance_scale, params.height)] == [
        (int, 3),
        (float, 1.5),
        (int, 64),
    ]
    with pytest.raises(InvalidRequestError, match=r"seed=1.5 must be an integer"):
        OmniDiffusionSamplingParams(seed=np.float64(1.5))
