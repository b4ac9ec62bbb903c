from __future__ import annotations

import dataclasses
import gc
import traceback
import weakref

import pytest
import torch

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.denoise import DenoiseState
from vllm_omni.diffusion.engine.results import _accelerations
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import QwenImagePipeline
from vllm_omni.errors import (
    EngineClosedError,
    GenerationError,
    InsufficientMemoryError,
    InvalidRequestError,
    NonFiniteOutputError,
)

SMALL = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 1}


def params(**values):
    return OmniDiffusionSamplingParams(**(SMALL | values))


@pytest.fixture
def pipeline(qwen_omni):
    """The pipeline behind the shared engine, to make it fail."""
    return qwen_omni._engine._executor._worker._runner.pipeline


def test_outputs_come_in_the_order_of_the_prompts(qwen_omni):
    outputs = qwen_omni.generate(["one", "two", "three"], [params(num_inference_steps=n) for n in (4, 1, 2)])
    assert [output.prompt for output in outputs] == ["one", "two", "three"]
    assert [output.metrics.num_steps for output in outputs] == [4, 1, 2]
    assert len({output.request_id for output in outputs}) == 3
    assert all(output.finished for output in outputs)


def test_the_receipt_and_the_metrics_say_what_ran(qwen_omni, qwen_folder):
    prompt = {"prompt": "a cat", "negative_prompt": "blurry"}
    output = qwen_omni.generate(prompt, params(num_outputs_per_prompt=2, true_cfg_scale=2.5))[0]
    receipt, metrics = output.receipt, output.metrics
    assert receipt.model == str(qwen_folder)
    assert receipt.pipeline == "QwenImagePipeline"
    assert (receipt.dtype, receipt.device, receipt.attention_backends) == ("float32", "cpu", ("TORCH_SDPA",))
    assert (receipt.num_inference_steps, receipt.seeds, receipt.height, receipt.width) == (3, (1, 2), 32, 32)
    assert receipt.guidance == "classifier-free, scale 2.5"
    assert len(output.images) == 2
    stages = (metrics.prepare_s, metrics.denoise_s, metrics.decode_s, metrics.post_process_s)
    assert all(seconds > 0 for seconds in stages)
    assert metrics.total_s >= sum(stages)
    assert metrics.peak_memory_bytes > 10**6


def test_the_receipt_says_how_ranks_shared_the_work(qwen_omni):
    shared = DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2)
    config = dataclasses.replace(qwen_omni.od_config, parallel_config=shared)
    assert _accelerations(config, None) == ("cfg_parallel_size=2", "ulysses_degree=2")
    assert _accelerations(qwen_omni.od_config, None) == ()


def test_a_drawn_seed_in_the_receipt_makes_the_picture_again(qwen_omni):
    first = qwen_omni.generate("a cat", params(seed=None))[0]
    again = qwen_omni.generate("a cat", params(seed=first.receipt.seeds[0]))[0]
    assert first.images[0].tobytes() == again.images[0].tobytes()


def test_progress_is_told_after_each_step(qwen_omni):
    events = []
    outputs = qwen_omni.generate(["one", "two"], params(), progress=events.append)
    for output in outputs:
        mine = [(event.step, event.num_steps) for event in events if event.request_id == output.request_id]
        assert mine == [(1, 3), (2, 3), (3, 3)]


def test_a_request_can_be_aborted_between_two_steps(qwen_omni):
    def abort_first(event):
        if event.step == 2 and event.request_id == first_id(event):
            assert qwen_omni.abort(event.request_id)

    seen = []

    def first_id(event):
        seen.append(event.request_id)
        return seen[0]

    aborted, kept = qwen_omni.generate(["one", "two"], params(num_inference_steps=5), progress=abort_first)
    assert (aborted.finished, aborted.finish_reason, aborted.images) == (False, "aborted", [])
    assert aborted.metrics.num_steps == 2
    assert kept.finished
    alone = qwen_omni.generate("two", params(num_inference_steps=5))[0]
    assert max_difference(kept, alone) <= 1
    assert not qwen_omni.abort(aborted.request_id)


def max_difference(first, second):
    import numpy as np

    return np.abs(np.asarray(first.images[0], np.int16) - np.asarray(second.images[0], np.int16)).max()


def test_an_exception_in_the_progress_callback_ends_the_call_and_leaves_nothing_behind(qwen_omni):
    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwen_omni.generate(["one", "two"], params(), progress=interrupt)
    assert not qwen_omni._engine._executor._worker._runner._running
    outputs = qwen_omni.generate("three", params())
    assert [output.prompt for output in outputs] == ["three"]


def test_a_bad_request_is_refused_before_any_work_and_the_engine_goes_on(qwen_omni):
    with pytest.raises(InvalidRequestError, match="prompt 1 of 0 to 1: height=33") as caught:
        qwen_omni.generate(["fine", "fine"], [params(), params(height=33)])
    assert caught.value.param == "height"
    assert not qwen_omni._engine.has_requests
    assert qwen_omni.generate("fine", params())[0].finished


@pytest.mark.parametrize(
    ("prompts", "sampling_params", "param"),
    [
        ([], None, "prompts"),
        (["a"], [], "sampling_params"),
        (["a", "b"], [OmniDiffusionSamplingParams()], "sampling_params"),
        ("a", {"height": 32}, "sampling_params"),
    ],
)
def test_lists_that_do_not_match_are_refused(qwen_omni, prompts, sampling_params, param):
    with pytest.raises(InvalidRequestError) as caught:
        qwen_omni.generate(prompts, sampling_params)
    assert caught.value.param == param
    for max_batch_size in (0, 1.5, True, "2"):
        with pytest.raises(InvalidRequestError, match="max_batch_size"):
            qwen_omni.generate("a", max_batch_size=max_batch_size)


def test_a_step_that_fails_for_one_request_is_repeated_for_the_others(qwen_omni, pipeline, monkeypatch):
    predict = pipeline.predict
    bad_length = 9

    def fails_for_one(latents, timestep, conditions):
        if latents.shape[0] > 1 or conditions["encoder_hidden_states"].shape[1] == bad_length:
            raise RuntimeError("the kernel gave up")
        return predict(latents, timestep, conditions)

    alone = qwen_omni.generate("a red circle", params())[0]
    monkeypatch.setattr(pipeline, "predict", fails_for_one)
    embeds = torch.randn(bad_length, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(GenerationError, match="the kernel gave up") as caught:
        qwen_omni.generate([{"prompt_embeds": embeds}, "a red circle"], params())
    failed, kept = caught.value.outputs
    assert failed.finish_reason == "failed"
    assert kept.images[0].tobytes() == alone.images[0].tobytes()


def test_memory_that_runs_out_is_explained(qwen_omni, pipeline, monkeypatch):
    def exhausted(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(pipeline, "predict", exhausted)
    with pytest.raises(GenerationError) as caught:
        qwen_omni.generate("a cat", params())
    assert isinstance(caught.value.__cause__, InsufficientMemoryError)
    assert "vae_use_tiling" in str(caught.value.__cause__)
    monkeypatch.undo()
    assert qwen_omni.generate("a cat", params())[0].finished


def test_latents_that_are_not_finite_are_an_error_and_no_black_picture(qwen_omni, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "predict", lambda latents, timestep, conditions: latents * float("nan"))
    with pytest.raises(GenerationError) as caught:
        qwen_omni.generate("a cat", params())
    assert isinstance(caught.value.__cause__, NonFiniteOutputError)


def test_a_closed_engine_says_so(qwen_folder):
    with Omni(str(qwen_folder)) as omni:
        pass
    omni.close()
    with pytest.raises(EngineClosedError):
        omni.generate("a cat")
    with pytest.raises(EngineClosedError):
        omni.abort("req-1")


def test_closing_frees_the_model(qwen_folder):
    omni = Omni(str(qwen_folder))
    model = weakref.ref(omni._engine._executor._worker._runner.pipeline)
    omni.close()
    assert model() is None, "it must be gone before the allocator is told to give memory back"


@pytest.mark.parametrize(
    "cause",
    [InvalidRequestError("no such colour", param="prompt"), torch.OutOfMemoryError("20 GiB"), ArithmeticError("a bug")],
    ids=lambda cause: type(cause).__name__,
)
def test_an_error_that_is_kept_keeps_no_model(qwen_folder, monkeypatch, cause):
    def prepare(pipeline, _request):
        weights = pipeline.transformer
        if isinstance(cause, ArithmeticError):
            raise cause
        (lambda: fail(weights))()

    def fail(_weights):
        raise cause

    monkeypatch.setattr(QwenImagePipeline, "prepare", prepare)
    omni = Omni(str(qwen_folder))
    model = weakref.ref(omni._engine._executor._worker._runner.pipeline)
    with pytest.raises((InvalidRequestError, GenerationError)) as caught:
        omni.generate("a cat", params())
    omni.close()
    assert model() is None, f"kept by {caught.value!r}"
    assert "prepare" in [entry.name for entry in traceback.extract_tb(cause.__traceback__)] or not isinstance(
        cause, ArithmeticError
    )


def test_a_generator_gives_each_request_other_noise_and_as_often_as_it_is_seeded_the_same(qwen_omni):
    def pictures():
        given = params(seed=None, generator=torch.Generator().manual_seed(3))
        with pytest.raises(InvalidRequestError):  # takes nothing of it
            qwen_omni.generate(["a cat", {"prompt": 1}], given)
        qwen_omni.resolve("a cat", given)  # nor does this
        outputs = [*qwen_omni.generate(["a cat", "a cat"], given), *qwen_omni.generate("a cat", given)]
        return [output.images[0].tobytes() for output in outputs]

    first = pictures()
    assert len(set(first)) == 3
    assert pictures() == first


def test_a_generator_on_a_device_that_the_model_is_not_on_is_refused(qwen_omni):
    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 1)

    with pytest.raises(InvalidRequestError, match=r"generator is on cuda:1, the model on cpu; use") as caught:
        qwen_omni.generate("a cat", params(seed=None, generator=Elsewhere()))
    assert caught.value.param == "generator"


def test_nothing_of_a_request_is_left_when_it_is_done_or_aborted(qwen_omni):
    qwen_omni.generate(["one", "two"], [params(), params(num_inference_steps=2)])
    qwen_omni.generate("three", params(), progress=lambda event: qwen_omni.abort(event.request_id))
    gc.collect()
    assert not any(type(thing) is DenoiseState for thing in gc.get_objects())


def test_random_weights_need_only_the_configurations(qwen_folder, tmp_path):
    import shutil

    configurations = tmp_path / "configurations"
    shutil.copytree(qwen_folder, configurations, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    embeds = {"prompt_embeds": torch.randn(5, 32), "negative_prompt_embeds": torch.randn(7, 32)}
    with Omni(str(configurations), load_format="dummy") as omni:
        output = omni.generate(embeds, params(output_type="latent"))[0]
        assert torch.isfinite(output.images[0]).all()
        with pytest.raises(InvalidRequestError, match="give prompt_embeds instead of prompt"):
            omni.generate("a cat", params())


def test_more_requests_than_seats_wait_their_turn(qwen_folder):
    with Omni(str(qwen_folder), max_num_seqs=2) as omni:
        outputs = omni.generate(["one", "two", "three", "four", "five"], params())
    assert [output.prompt for output in outputs] == ["one", "two", "three", "four", "five"]
    assert outputs[4].metrics.queue_s > outputs[0].metrics.queue_s


def test_progress_bars_are_quiet_unless_asked_for(qwen_folder, capfd):
    with Omni(str(qwen_folder)) as omni:
        omni.generate("a cat", params())
    assert capfd.readouterr().err == ""
    with Omni(str(qwen_folder), show_progress=True) as omni:
        omni.generate("a cat", params())
    shown = capfd.readouterr().err
    assert "loading: 100%" in shown
    assert "steps: 100%" in shown
