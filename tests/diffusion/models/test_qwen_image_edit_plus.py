"""Qwen-Image-Edit-2509 and -2511 against diffusers on tiny random checkpoints, float32 on the CPU.

The areas that pictures are brought to are made smaller on both sides, except where sizes themselves are under test.
"""

from __future__ import annotations

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as diffusers_plus
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline

from tests import tiny_qwen_edit
from tests.parity import BF16_TOLERANCE, assert_same_latents, assert_same_pictures, generators, relative_difference
from tests.tiny_qwen_edit import picture
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image_edit_plus
from vllm_omni.errors import InvalidRequestError

SHORT, LONG = "swap them", "the cat of picture 1 wears the hat of picture 2 {braces}, left of the circle"
AREAS = {"_ENCODER_AREA": 60 * 60, "_LATENTS_AREA": 80 * 80}
WIDE, TALL, SQUARE = picture(90, 60), picture(50, 90, seed=1), picture(64, 64, seed=2)
calculate_dimensions = diffusers_plus.calculate_dimensions


def _smaller(area, ratio):
    return calculate_dimensions(AREAS["_LATENTS_AREA"] if area == 1024 * 1024 else area, ratio)


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_plus, "calculate_dimensions", _smaller)
        patch.setattr(diffusers_plus, "CONDITION_IMAGE_SIZE", AREAS["_ENCODER_AREA"])
        for name, area in AREAS.items():
            patch.setattr(pipeline_qwen_image_edit_plus, name, area)
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["2511", "2509"])
def folder(request, tmp_path_factory):
    return tiny_qwen_edit.qwen_image_edit_plus(
        tmp_path_factory.mktemp("checkpoints") / "plus", zero_cond_t=request.param
    )


@pytest.fixture(scope="module")
def omni(folder):
    with Omni(str(folder)) as omni:
        yield omni


@pytest.fixture(scope="module")
def reference(folder):
    return tiny_qwen_edit.reference_pipeline(QwenImageEditPlusPipeline, folder)


def reference_images(pipeline, images, prompt, seeds=(7,), steps=3, output_type="latent", **arguments):
    return pipeline(
        image=images,
        prompt=prompt,
        generator=generators(*seeds),
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        output_type=output_type,
        **arguments,
    ).images


def params(seed=7, steps=3, output_type="latent", **values):
    return OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, output_type=output_type, **values)


def edit(images, prompt=SHORT, negative=None):
    return {"prompt": prompt, "negative_prompt": negative, "multi_modal_data": {"image": images}}


def stacked(output):
    return torch.stack(output.images)


@pytest.mark.parametrize("images", [[WIDE], [WIDE, TALL], [TALL, SQUARE, WIDE]], ids=["one", "two", "three"])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_latents_match_diffusers(omni, reference, images, negative):
    expected = reference_images(reference, images, LONG, negative_prompt=negative)
    assert_same_latents(stacked(omni.generate(edit(images, LONG, negative), params())[0]), expected)


def test_pictures_match_diffusers(omni, reference):
    expected = reference_images(reference, [WIDE, TALL], SHORT, output_type="pil", negative_prompt="blurry")
    output = omni.generate(edit([WIDE, TALL], SHORT, "blurry"), params(output_type="pil"))[0]
    assert_same_pictures(output.images, expected)
    assert output.images[0].size == (64, 96), "an absent size is that of the last picture"


def test_a_given_size_and_several_outputs_match_diffusers(omni, reference):
    size = {"height": 48, "width": 80}
    expected = reference_images(reference, [WIDE, TALL], SHORT, seeds=(7, 8), **size)
    output = omni.generate(edit([WIDE, TALL]), params(num_outputs_per_prompt=2, **size))[0]
    assert_same_latents(stacked(output), expected)


def test_the_order_of_pictures_matters(omni):
    size = {"height": 64, "width": 64}
    first, second = (stacked(omni.generate(edit(images), params(**size))[0]) for images in ([WIDE, TALL], [TALL, WIDE]))
    assert (first - second).abs().max() > 1e-3


def test_pictures_are_brought_to_the_sizes_that_diffusers_gives_them(omni, monkeypatch):
    monkeypatch.setattr(pipeline_qwen_image_edit_plus, "_ENCODER_AREA", 384 * 384)
    monkeypatch.setattr(pipeline_qwen_image_edit_plus, "_LATENTS_AREA", 1024 * 1024)
    request = omni._engine.validate(edit([WIDE, TALL]), params())
    ratios = [image.width / image.height for image in (WIDE, TALL)]
    for name, area in (("encoder_pictures", 384 * 384), ("latents_pictures", 1024 * 1024)):
        assert [image.size for image in request.extra[name]] == [calculate_dimensions(area, ratio) for ratio in ratios]


def test_mixed_requests_give_what_they_give_alone(omni):
    cases = [
        (edit([WIDE, TALL], SHORT, "blurry"), params(seed=1, steps=3, true_cfg_scale=2.0)),
        (edit([picture(90, 60, seed=4), TALL], LONG, ""), params(seed=2, steps=4, true_cfg_scale=6.0)),
        (edit([WIDE, TALL], LONG), params(seed=3, steps=2, num_outputs_per_prompt=3)),
        (edit(SQUARE), params(seed=4, steps=2)),
    ]
    together = omni.generate([prompt for prompt, _ in cases], [values for _, values in cases])
    for (prompt, values), in_batch in zip(cases, together, strict=True):
        assert_same_latents(stacked(in_batch), stacked(omni.generate(prompt, values)[0]), 2e-5)


def test_bf16_stays_near_diffusers_in_bf16(folder):
    pipeline = tiny_qwen_edit.reference_pipeline(QwenImageEditPlusPipeline, folder, dtype=torch.bfloat16)
    expected = reference_images(pipeline, [WIDE, TALL], LONG, negative_prompt="blurry")
    with Omni(str(folder), dtype="bfloat16") as omni:
        output = omni.generate(edit([WIDE, TALL], LONG, "blurry"), params())[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


@pytest.mark.parametrize("images", [[], [SQUARE] * 9, [WIDE, b"no picture"], [WIDE, "https://example.org/a.png"]])
def test_pictures_that_cannot_be_taken_are_refused_by_name(omni, images):
    with pytest.raises(InvalidRequestError) as caught:
        omni._engine.validate(edit(images), params())
    assert caught.value.param == "image"
