"""Qwen-Image-Layered against diffusers on a tiny random checkpoint, float32 on the CPU.

The area that pictures are brought to is made smaller on both sides, except where sizes themselves are under test.
diffusers fails for ``output_type="latent"``, so its latents are those that it tells a callback at the last step.
"""

from __future__ import annotations

import asyncio

import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as diffusers_layered
import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline

from tests import tiny_qwen_edit
from tests.parity import BF16_TOLERANCE, assert_same_latents, assert_same_pictures, generators, relative_difference
from tests.tiny_qwen_edit import picture
from vllm_omni import AsyncOmni, Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.models.qwen_image import pictures
from vllm_omni.errors import InvalidRequestError

SHORT, LONG = "a red circle", "a cat holding a sign {braces}, left of a small blue square"
WIDE, TALL = picture(90, 60, mode="RGBA"), picture(50, 90, seed=1, mode="RGBA")
calculate_dimensions = diffusers_layered.calculate_dimensions
fit_to_area = pictures.fit_to_area


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_layered, "calculate_dimensions", lambda area, r: calculate_dimensions(area // 64, r))
        patch.setattr(pictures, "fit_to_area", lambda image, area, *multiple: fit_to_area(image, area // 64, *multiple))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen_edit.qwen_image_layered(tmp_path_factory.mktemp("checkpoints") / "layered")


@pytest.fixture(scope="module")
def omni(folder):
    with Omni(str(folder)) as omni:
        yield omni


@pytest.fixture(scope="module")
def reference(folder):
    return tiny_qwen_edit.reference_pipeline(QwenImageLayeredPipeline, folder)


def reference_run(pipeline, image, prompt, seed=7, steps=3, output_type="pil", **arguments):
    """Layers of the one output, and its latents."""
    latents = []

    def keep(_pipeline, _step, _timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    layers = pipeline(
        image=image,
        prompt=prompt,
        generator=generators(seed)[0],
        num_inference_steps=steps,
        output_type=output_type,
        callback_on_step_end=keep,
        **arguments,
    ).images[0]
    return layers, latents[-1]


def params(seed=7, steps=3, output_type="latent", layers=2, extra=None, **values):
    extra_args = {"layers": layers, **(extra or {})}
    return OmniDiffusionSamplingParams(
        seed=seed, num_inference_steps=steps, output_type=output_type, extra_args=extra_args, **values
    )


def layered(image, prompt=SHORT, negative=None):
    return {"prompt": prompt, "negative_prompt": negative, "multi_modal_data": {"image": image}}


def stacked(output):
    return torch.stack(output.images)


@pytest.mark.parametrize("image", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("negative", [None, " "])
@pytest.mark.parametrize("layers", [1, 3])
def test_latents_match_diffusers(omni, reference, image, negative, layers):
    _, expected = reference_run(reference, image, LONG, negative_prompt=negative, layers=layers)
    output = omni.generate(layered(image, LONG, negative), params(layers=layers))[0]
    assert_same_latents(stacked(output), expected)


def test_layers_are_rgba_pictures_that_match_diffusers(omni, reference):
    expected, _ = reference_run(reference, WIDE, SHORT, negative_prompt=" ", layers=3)
    output = omni.generate(layered(WIDE, SHORT, " "), params(output_type="pil", layers=3))[0]
    assert len(output.images) == 1
    assert [layer.mode for layer in output.images[0]] == ["RGBA"] * 3
    assert_same_pictures(output.images[0], expected)
    assert (output.receipt.width, output.receipt.height) == output.images[0][0].size


@pytest.mark.parametrize(("output_type", "shape"), [("np", (2, 64, 96, 4)), ("pt", (2, 4, 64, 96))])
def test_arrays_and_tensors_have_one_entry_per_output(omni, reference, output_type, shape):
    expected, _ = reference_run(reference, WIDE, SHORT, output_type=output_type, layers=2)
    images = omni.generate(layered(WIDE), params(output_type=output_type, num_outputs_per_prompt=2))[0].images
    assert [tuple(image.shape) for image in images] == [shape, shape]
    assert np.abs(np.asarray(images[0]) - np.asarray(expected)).max() < 1e-4


@pytest.mark.parametrize("extra", [{"cfg_normalize": True}, {"resolution": 1024}])
def test_parameters_of_this_model_match_diffusers(omni, reference, extra):
    _, expected = reference_run(reference, WIDE, SHORT, negative_prompt="blurry", layers=2, **extra)
    output = omni.generate(layered(WIDE, SHORT, "blurry"), params(extra=extra))[0]
    assert_same_latents(stacked(output), expected)


@pytest.mark.parametrize("in_english", [True, False])
@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_prompt_becomes_the_caption_that_diffusers_writes(omni, reference, in_english, prompt):
    _, expected = reference_run(reference, WIDE, prompt, use_en_prompt=in_english, layers=1)
    output = omni.generate(layered(WIDE, prompt), params(layers=1, extra={"use_en_prompt": in_english}))[0]
    assert_same_latents(stacked(output), expected)


def test_the_caption_is_asked_for_with_the_inputs_of_diffusers(omni, reference, monkeypatch):
    asked = []

    def generate(**inputs):
        asked.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return inputs["input_ids"]  # no answer at all

    for encoder in (reference.text_encoder, omni._engine._executor._worker._runner.pipeline.text_encoder):
        monkeypatch.setattr(encoder, "generate", generate)
    reference_run(reference, WIDE, "", steps=1, layers=1)
    omni.generate(layered(WIDE, ""), params(steps=1, layers=1))
    expected, ours = asked
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_absent_parameters_get_their_defaults_at_the_door(omni):
    given = {"layers": 3}
    request = omni._engine.validate(layered(WIDE), OmniDiffusionSamplingParams(extra_args=given))
    expected = {"layers": 3, "resolution": 640, "cfg_normalize": False, "use_en_prompt": False}
    assert request.sampling_params.extra_args == expected
    assert given == {"layers": 3}, "the user's own dict stays as it was"


def test_layers_are_not_decoded_for_previews_that_nobody_could_show(folder):
    async def watch(omni):
        return [event async for event in omni.generate(layered(WIDE), params(steps=1), previews={1})]

    with AsyncOmni(str(folder)) as omni, pytest.raises(InvalidRequestError, match="no decoder of single pictures"):
        asyncio.run(watch(omni))


@pytest.mark.parametrize("resolution", [640, 1024])
def test_the_picture_is_brought_to_the_size_that_diffusers_gives_it(omni, monkeypatch, resolution):
    monkeypatch.setattr(pictures, "fit_to_area", fit_to_area)
    request = omni._engine.validate(layered(WIDE), params(extra={"resolution": resolution}))
    assert request.extra["picture"].size == calculate_dimensions(resolution**2, WIDE.width / WIDE.height)


def test_a_picture_without_transparency_is_opaque(omni):
    opaque = picture(90, 60)
    first, second = (stacked(omni.generate(layered(image), params())[0]) for image in (opaque, opaque.convert("RGBA")))
    assert torch.equal(first, second)


def test_output_i_uses_seed_plus_i(omni, reference):
    both = stacked(omni.generate(layered(WIDE, SHORT, " "), params(num_outputs_per_prompt=2))[0])
    for row, seed in enumerate((7, 8)):
        _, expected = reference_run(reference, WIDE, SHORT, seed=seed, negative_prompt=" ", layers=2)
        assert_same_latents(both[row : row + 1], expected)


def test_given_latents_match_diffusers(omni, reference):
    latents = torch.randn(1, 3 * 24, 32, generator=torch.Generator().manual_seed(1))
    _, expected = reference_run(reference, WIDE, SHORT, latents=latents, layers=2)
    assert_same_latents(stacked(omni.generate(layered(WIDE), params(latents=latents))[0]), expected)


def test_mixed_requests_give_what_they_give_alone(omni):
    cases = [
        (layered(WIDE, SHORT, " "), params(seed=1, steps=3, true_cfg_scale=2.0)),
        (layered(WIDE, LONG, " "), params(seed=2, steps=4, true_cfg_scale=6.0, extra={"cfg_normalize": True})),
        (layered(WIDE, LONG), params(seed=3, steps=2, num_outputs_per_prompt=2)),
        (layered(WIDE, SHORT), params(seed=4, steps=2, layers=3)),
        (layered(TALL, SHORT), params(seed=5, steps=2)),
    ]
    together = omni.generate([prompt for prompt, _ in cases], [values for _, values in cases])
    for (prompt, values), in_batch in zip(cases, together, strict=True):
        assert_same_latents(stacked(in_batch), stacked(omni.generate(prompt, values)[0]), 2e-5)


def test_bf16_stays_near_diffusers_in_bf16(folder):
    pipeline = tiny_qwen_edit.reference_pipeline(QwenImageLayeredPipeline, folder, dtype=torch.bfloat16)
    _, expected = reference_run(pipeline, WIDE, LONG, negative_prompt=" ", layers=2)
    with Omni(str(folder), dtype="bfloat16") as omni:
        output = omni.generate(layered(WIDE, LONG, " "), params())[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "values", "param"),
    [
        ({"prompt": SHORT}, {}, "image"),
        (layered([WIDE, TALL]), {}, "image"),
        (layered(WIDE), {"height": 64}, "height"),
        (layered(WIDE), {"extra_args": {"layers": 0}}, "extra_args.layers"),
        (layered(WIDE), {"extra_args": {"layers": 2.0}}, "extra_args.layers"),
        (layered(WIDE), {"extra_args": {"resolution": 512}}, "extra_args.resolution"),
        (layered(WIDE), {"extra_args": {"cfg_normalize": 1}}, "extra_args.cfg_normalize"),
        (layered(WIDE), {"extra_args": {"layer": 2}}, "extra_args.layer"),
        (layered(WIDE), {"latents": torch.zeros(1, 24, 32)}, "latents"),
    ],
)
def test_what_the_model_cannot_honour_is_refused_by_name(omni, prompt, values, param):
    with pytest.raises(InvalidRequestError) as caught:
        omni._engine.validate(prompt, OmniDiffusionSamplingParams(**values))
    assert caught.value.param == param
