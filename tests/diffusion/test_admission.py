from __future__ import annotations

import dataclasses

import pytest

from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.data import RequestSpec, SameAs
from vllm_omni.diffusion.engine.admission import admit
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import MAX_SEED

SPEC = RequestSpec(
    defaults={"height": 1024, "width": 1024, "num_inference_steps": 50, "true_cfg_scale": 4.0},
    size_multiple=16,
    prompt_keys=frozenset({"prompt", "negative_prompt"}),
)


def admitted(prompt="a cat", defaults=None, spec=SPEC, **values):
    return admit(prompt, Params(**values), spec, {} if defaults is None else defaults)


def test_absent_parameters_get_the_models_defaults():
    params = admitted({"prompt": "a cat", "negative_prompt": ""}).sampling_params
    assert (params.height, params.width, params.num_inference_steps) == (1024, 1024, 50)
    assert (params.true_cfg_scale, params.num_outputs_per_prompt, params.output_type) == (4.0, 1, "pil")


def test_a_checkpoints_defaults_win_over_the_pipelines_and_the_request_over_both():
    defaults = {"height": 256, "num_inference_steps": 20, "negative_prompt": " "}
    request = admitted(defaults=defaults, num_inference_steps=7)
    params = request.sampling_params
    assert (params.height, params.width, params.num_inference_steps) == (256, 1024, 7)
    assert request.prompt["negative_prompt"] == " "
    assert params.true_cfg_scale == 4.0


def test_without_a_negative_prompt_guidance_is_off_and_asking_for_it_is_an_error():
    assert admitted().sampling_params.true_cfg_scale == 1.0
    with pytest.raises(InvalidRequestError, match="needs a negative prompt") as caught:
        admitted(true_cfg_scale=3.0)
    assert caught.value.param == "negative_prompt"


def test_a_negative_prompt_that_would_change_nothing_is_an_error():
    off = dataclasses.replace(SPEC, defaults={**SPEC.defaults, "true_cfg_scale": 1.0})
    prompt = {"prompt": "a cat", "negative_prompt": "blurry"}
    with pytest.raises(InvalidRequestError, match="has no effect at true_cfg_scale=1, this model's default") as caught:
        admitted(prompt, spec=off)
    assert caught.value.param == "negative_prompt"
    assert admitted(prompt, spec=off, true_cfg_scale=1.0).sampling_params.true_cfg_scale == 1.0
    assert admitted(prompt, spec=off, defaults={"true_cfg_scale": 3.0}).sampling_params.true_cfg_scale == 3.0
    assert admitted(spec=off, defaults={"negative_prompt": " "}).sampling_params.true_cfg_scale == 1.0


def test_the_callers_objects_stay_as_they_are():
    params = Params()
    prompt = {"prompt": "a cat"}
    admit(prompt, params, SPEC, {"negative_prompt": " "})
    assert params == Params()
    assert prompt == {"prompt": "a cat"}


@pytest.mark.parametrize(("name", "value", "nearest"), [("height", 250, 256), ("width", 1, 16), ("width", 1033, 1040)])
def test_a_size_off_the_grid_is_refused_with_the_nearest(name, value, nearest):
    with pytest.raises(InvalidRequestError, match=f"{name}={value} must be a multiple of 16; the nearest is {nearest}"):
        admitted(**{name: value})


def test_a_size_that_no_memory_holds_is_refused():
    assert admitted(height=4096, width=4096).sampling_params.height == 4096
    with pytest.raises(InvalidRequestError, match=r"268,435,456 pixels; at most 16,777,216 \(4096 x 4096\)"):
        admitted(height=16384, width=16384)


def test_a_video_that_no_memory_holds_is_refused():
    spec = RequestSpec(defaults={"height": 1024, "width": 1024, "num_frames": 16}, size_multiple=16)
    assert admitted(spec=spec, num_frames=2048).sampling_params.num_frames == 2048
    with pytest.raises(
        InvalidRequestError, match=r"num_frames=2049 of 1024 x 1024 make 2,148,532,224 pixels"
    ) as caught:
        admitted(spec=spec, num_frames=2049)
    assert caught.value.param == "num_frames"


@pytest.mark.parametrize("values", [{"height": 16384, "width": 16384}, {"height": 33}])
def test_a_size_that_is_refused_never_reaches_a_pre_process_function(values):
    def pre_process(request):
        raise AssertionError("it would bring a picture to this size")

    with pytest.raises(InvalidRequestError, match="height"):
        admit("a", Params(**values), SPEC, {}, pre_process)


def test_a_drawn_seed_is_told_and_differs_each_time():
    seeds = {admitted().sampling_params.seed for _ in range(8)}
    assert len(seeds) == 8
    assert None not in seeds


def test_seeds_of_all_outputs_must_fit():
    assert admitted(seed=5, num_outputs_per_prompt=3).seeds == [5, 6, 7]
    with pytest.raises(InvalidRequestError, match="seed"):
        admitted(seed=MAX_SEED, num_outputs_per_prompt=2)


def test_parameters_changed_after_construction_are_checked_again():
    params = Params()
    params.height = -16
    with pytest.raises(InvalidRequestError, match="height"):
        admit("a cat", params, SPEC, {})


def test_a_pipeline_without_a_spec_gets_the_parameters_as_they_came():
    params = admitted(spec=None, guidance_scale=0.0).sampling_params
    assert params.height is None
    assert params.guidance_scale == 0.0
    assert params.seed is not None


def test_a_default_may_be_the_value_of_another_parameter():
    spec = RequestSpec(
        defaults={"height": 16, "width": 16, "guidance_scale": 5.0, "guidance_scale_2": SameAs("guidance_scale")}
    )
    assert admitted(spec=spec).sampling_params.guidance_scale_2 == 5.0
    assert admitted(spec=spec, guidance_scale=3.0).sampling_params.guidance_scale_2 == 3.0
    assert admitted(spec=spec, guidance_scale_2=0.0).sampling_params.guidance_scale_2 == 0.0
    assert admitted(spec=spec, defaults={"guidance_scale_2": 2.0}).sampling_params.guidance_scale_2 == 2.0


def test_a_pre_process_function_settles_what_the_request_and_the_checkpoint_leave_open():
    def pre_process(request):
        params = request.sampling_params
        params.height = 32 if params.height is None else params.height
        params.width = 48 if params.width is None else params.width
        return request

    request = admit("a", Params(height=64), SPEC, {"num_inference_steps": 3}, pre_process)
    params = request.sampling_params
    assert (params.height, params.width, params.num_inference_steps) == (64, 48, 3)
    request = admit("a", Params(), SPEC, {"width": 80}, pre_process)
    assert (request.sampling_params.height, request.sampling_params.width) == (32, 80)


def test_what_a_pre_process_function_sets_is_checked():
    def pre_process(request):
        request.sampling_params.height = 33
        return request

    with pytest.raises(InvalidRequestError, match="height=33 must be a multiple"):
        admit("a", Params(), SPEC, {}, pre_process)


def test_a_pre_process_function_must_return_a_request():
    with pytest.raises(TypeError, match="returned NoneType, no request"):
        admit("a", Params(), SPEC, {}, lambda request: None)


def test_absent_extra_args_get_their_defaults_and_the_users_dict_stays_as_it_was():
    spec = dataclasses.replace(SPEC, extra_args={"layers": 4, "resolution": 640, "normalize": False})
    given = {"resolution": 1024}
    params = admit("a", Params(extra_args=given), spec, {"extra_args": {"layers": 2}})
    assert params.sampling_params.extra_args == {"layers": 2, "resolution": 1024, "normalize": False}
    assert given == {"resolution": 1024}
