"""Qwen-Image-Edit against diffusers on a tiny random checkpoint, float32 on the CPU.

The area that pictures are brought to is made smaller on both sides, except where sizes themselves are under test.
"""

from __future__ import annotations

import base64
import io
import shutil

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as diffusers_edit
import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

from tests import tiny_qwen_edit
from tests.parity import BF16_TOLERANCE, assert_same_latents, assert_same_pictures, generators, relative_difference
from tests.tiny_qwen_edit import picture
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image_edit
from vllm_omni.errors import InvalidRequestError

SHORT, LONG = "make it blue", "turn this cat into a dog that holds a sign {braces}, left of the circle"
AREA = 80 * 80
WIDE, TALL = picture(90, 60), picture(50, 90, seed=1)
calculate_dimensions = diffusers_edit.calculate_dimensions


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers_edit, "calculate_dimensions", lambda _, ratio: calculate_dimensions(AREA, ratio))
        patch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", AREA)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen_edit.qwen_image_edit(tmp_path_factory.mktemp("checkpoints") / "edit")


@pytest.fixture(scope="module")
def omni(folder):
    with Omni(str(folder)) as omni:
        yield omni


@pytest.fixture(scope="module")
def reference(folder):
    return tiny_qwen_edit.reference_pipeline(QwenImageEditPipeline, folder)


def reference_images(pipeline, image, prompt, seeds=(7,), steps=3, output_type="latent", **arguments):
    return pipeline(
        image=image,
        prompt=prompt,
        generator=generators(*seeds),
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        output_type=output_type,
        **arguments,
    ).images


def params(seed=7, steps=3, output_type="latent", **values):
    return OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, output_type=output_type, **values)


def edit(image, prompt=SHORT, negative=None, **values):
    return {"prompt": prompt, "negative_prompt": negative, "multi_modal_data": {"image": image}, **values}


def stacked(output):
    return torch.stack(output.images)


@pytest.mark.parametrize("image", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("negative", [None, "blurry", ""])
def test_latents_match_diffusers(omni, reference, image, negative):
    expected = reference_images(reference, image, LONG, negative_prompt=negative)
    assert_same_latents(stacked(omni.generate(edit(image, LONG, negative), params())[0]), expected)


def test_pictures_match_diffusers(omni, reference):
    expected = reference_images(reference, WIDE, SHORT, output_type="pil", negative_prompt="blurry")
    output = omni.generate(edit(WIDE, SHORT, "blurry"), params(output_type="pil"))[0]
    assert_same_pictures(output.images, expected)
    assert (output.receipt.width, output.receipt.height) == output.images[0].size == (96, 64)


def test_a_given_size_matches_diffusers(omni, reference):
    expected = reference_images(reference, WIDE, SHORT, height=48, width=80)
    assert_same_latents(stacked(omni.generate(edit(WIDE), params(height=48, width=80))[0]), expected)


def test_an_absent_side_is_that_of_the_picture(omni):
    request = omni._engine.validate(edit(WIDE), params(height=32))
    assert (request.sampling_params.width, request.sampling_params.height) == (96, 32)


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (333, 1000), (3000, 30)])
def test_pictures_are_brought_to_the_size_that_diffusers_gives_them(omni, monkeypatch, size):
    monkeypatch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", 1024 * 1024)
    request = omni._engine.validate(edit(Image.new("RGB", size)), params())
    width, height, _ = calculate_dimensions(1024 * 1024, size[0] / size[1])
    assert request.extra["latents_pictures"][0].size == (width, height)
    assert (request.sampling_params.width, request.sampling_params.height) == (width, height)


def test_output_i_uses_seed_plus_i(omni, reference):
    expected = reference_images(reference, WIDE, SHORT, seeds=(7, 8), negative_prompt="blurry")
    both = stacked(omni.generate(edit(WIDE, SHORT, "blurry"), params(num_outputs_per_prompt=2))[0])
    assert_same_latents(both, expected)


def test_given_latents_match_diffusers(omni, reference):
    latents = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1))
    expected = reference_images(reference, WIDE, SHORT, latents=latents)
    assert_same_latents(stacked(omni.generate(edit(WIDE), params(latents=latents))[0]), expected)


def test_given_embeddings_match_diffusers(omni, reference):
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    negative = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    expected = reference_images(reference, WIDE, None, **given)
    prompt = {"multi_modal_data": {"image": WIDE}, **given}
    assert_same_latents(stacked(omni.generate(prompt, params())[0]), expected)


@pytest.mark.parametrize("missing", ["tokenizer", "processor"])
def test_random_weights_run_on_embeddings_where_a_processor_is_missing(folder, tmp_path, missing):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=lambda _, names: [name for name in names if name == missing])
    with Omni(str(bare), load_format="dummy") as omni:
        with pytest.raises(InvalidRequestError, match="give prompt_embeds instead of prompt"):
            omni.generate(edit(WIDE), params())
        prompt = {"prompt_embeds": torch.ones(4, 32), "multi_modal_data": {"image": WIDE}}
        assert torch.isfinite(stacked(omni.generate(prompt, params())[0])).all()


def test_bf16_stays_near_diffusers_in_bf16(folder):
    pipeline = tiny_qwen_edit.reference_pipeline(QwenImageEditPipeline, folder, dtype=torch.bfloat16)
    expected = reference_images(pipeline, WIDE, LONG, negative_prompt="blurry")
    with Omni(str(folder), dtype="bfloat16") as omni:
        output = omni.generate(edit(WIDE, LONG, "blurry"), params())[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


def test_mixed_requests_give_what_they_give_alone(omni, reference):
    other = picture(90, 60, seed=2)
    cases = [
        (edit(WIDE, SHORT, "blurry"), params(seed=1, steps=3, true_cfg_scale=2.0)),
        (edit(other, LONG, ""), params(seed=2, steps=4, true_cfg_scale=6.0)),
        (edit(WIDE, LONG), params(seed=3, steps=2, num_outputs_per_prompt=3)),
        (edit(TALL), params(seed=4, steps=2)),
    ]
    together = omni.generate([prompt for prompt, _ in cases], [values for _, values in cases])
    for (prompt, values), in_batch in zip(cases, together, strict=True):
        assert_same_latents(stacked(in_batch), stacked(omni.generate(prompt, values)[0]), 2e-5)
    expected = reference_images(reference, other, LONG, (2,), 4, negative_prompt="", true_cfg_scale=6.0)
    assert_same_latents(stacked(together[1]), expected)


def encoded(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def test_a_picture_may_come_in_any_form(omni):
    expected = stacked(omni.generate(edit(WIDE), params())[0])
    url = "data:image/png;base64," + base64.b64encode(encoded(WIDE)).decode()
    for image in (np.asarray(WIDE), encoded(WIDE), url, [WIDE], WIDE.convert("RGBA")):
        assert torch.equal(stacked(omni.generate(edit(image), params())[0]), expected)


def test_the_picture_and_each_text_are_encoded_once_for_all_outputs(omni, monkeypatch):
    pipeline = omni._engine._executor._worker._runner.pipeline
    calls = {}
    for name, module in (("vision", pipeline.text_encoder.visual), ("language", pipeline.text_encoder.language_model)):
        calls[name] = []
        monkeypatch.setattr(module, "forward", _counted(module.forward, calls[name]))
    calls["vae"] = []
    monkeypatch.setattr(pipeline.vae, "encode", _counted(pipeline.vae.encode, calls["vae"]))
    omni.generate(edit(WIDE, SHORT, "blurry"), params(num_outputs_per_prompt=3))
    assert {name: len(made) for name, made in calls.items()} == {"vision": 1, "language": 2, "vae": 1}


def _counted(function, calls):
    def call(*arguments, **keywords):
        calls.append(1)
        return function(*arguments, **keywords)

    return call


ANIMATION = io.BytesIO()
WIDE.save(ANIMATION, "GIF", save_all=True, append_images=[TALL.resize(WIDE.size)])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "works on a picture"),
        ([], "takes one picture"),
        ([WIDE, TALL], "takes one picture"),
        (b"no picture", "no picture"),
        (encoded(WIDE)[:60], "no picture|cannot be decoded"),
        ("/etc/passwd", "never opened"),
        ("file:///etc/passwd", "never opened"),
        (Image.new("1", (30_000, 30_000)), "at most"),
        (encoded(Image.new("1", (30_000, 30_000))), "scale it down"),
        (Image.new("1", (3000, 20)), "crop"),
        (ANIMATION.getvalue(), "animated"),
        (Image.fromarray(np.zeros((8, 8), np.uint16)), "8 bits"),
        (torch.zeros(3, 8, 8), "Tensor"),
    ],
)
def test_a_picture_that_cannot_be_edited_is_refused_by_name(omni, image, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        omni._engine.validate(edit(image), params())
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    ("prompt", "values", "param"),
    [
        ({"prompt": SHORT}, {}, "image"),
        (edit(WIDE), {"extra_args": {"layers": 3}}, "extra_args.layers"),
        (edit(WIDE), {"height": 50}, "height"),
        (edit(WIDE), {"guidance_scale": 3.5}, "guidance_scale"),
        (edit(WIDE), {"max_sequence_length": 2000}, "max_sequence_length"),
        (edit(WIDE), {"latents": torch.zeros(1, 3, 16)}, "latents"),
        (edit(WIDE, "a <|image_pad|> b"), {}, "prompt"),
        (edit(WIDE, SHORT, "<|video_pad|>"), {}, "negative_prompt"),
        ({"prompt": SHORT, "multi_modal_data": {"image": WIDE, "video": WIDE}}, {}, "multi_modal_data"),
        ({"prompt_embeds": torch.zeros(1, 4, 31), "multi_modal_data": {"image": WIDE}}, {}, "prompt_embeds"),
    ],
)
def test_what_the_model_cannot_honour_is_refused_by_name(omni, prompt, values, param):
    with pytest.raises(InvalidRequestError) as caught:
        omni._engine.validate(prompt, OmniDiffusionSamplingParams(**values))
    assert caught.value.param == param


def test_a_text_is_too_long_by_its_own_tokens_and_not_by_those_of_the_picture(omni, reference):
    without_picture = tiny_qwen_edit.EDIT_TEMPLATE.replace("<|image_pad|>", "").replace("{}", LONG)
    num_tokens = len(reference.tokenizer(without_picture).input_ids) - 64
    omni.generate(edit(WIDE, LONG), params(max_sequence_length=num_tokens))
    with pytest.raises(InvalidRequestError, match=f"prompt has {num_tokens} tokens"):
        omni.generate(edit(WIDE, LONG), params(max_sequence_length=num_tokens - 1))
