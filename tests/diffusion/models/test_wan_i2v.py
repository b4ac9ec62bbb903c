"""Wan image to video against diffusers on tiny random checkpoints, float32 on the CPU.

``python -m pytest tests/diffusion/models/test_wan_i2v.py`` is the whole comparison.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil

from tests import tiny_wan
from tests.parity import (
    BF16_TOLERANCE,
    assert_same_latents,
    assert_same_pictures,
    generators,
    relative_difference,
)
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.encoders.vae import decode_latents, encode_pixels
from vllm_omni.diffusion.models.wan2_2 import get_wan_i2v_pre_process_func
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidModelFolderError, InvalidRequestError

SHORT, LONG = "a red circle", "a cat holding a sign that says hello, left of a small blue square"
SMALL = {"height": 32, "width": 64, "num_frames": 5}
FORMS = {
    "wan2.2": lambda folder: tiny_wan.wan_i2v(folder),
    "wan2.1": lambda folder: tiny_wan.wan_i2v(folder, num_experts=1),
    "ti2v": lambda folder: tiny_wan.wan_ti2v(folder, pipeline_class=WanImageToVideoPipeline),
    # As TI2V-5B is published: its model_index.json names the text-to-video class.
    "ti2v as t2v": lambda folder: tiny_wan.wan_ti2v(folder),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan_i2v")
    return {name: build(root / name.replace(" ", "_")) for name, build in FORMS.items()}


@pytest.fixture(scope="module")
def omnis(folders):
    opened = {name: Omni(str(folder)) for name, folder in folders.items()}
    yield opened
    for omni in opened.values():
        omni.close()


@pytest.fixture(scope="module")
def references(folders):
    return {name: load_reference(folder) for name, folder in folders.items()}


def load_reference(folder, dtype=torch.float32):
    parts = {}
    if (folder / "image_processor").is_dir():
        parts["image_processor"] = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(width=80, height=50, seed=0):
    """Smooth colours and a little noise; of another size and other proportions than the video."""
    rows, columns = np.meshgrid(np.linspace(0, 200, height), np.linspace(0, 255, width), indexing="ij")
    noise = np.random.default_rng(seed).integers(0, 40, (height, width))
    return Image.fromarray(np.stack([rows, columns, 255 - rows + noise], axis=-1).clip(0, 255).astype(np.uint8))


def prompt(text=SHORT, image=None, **values):
    return {"prompt": text, "multi_modal_data": {"image": picture() if image is None else image}, **values}


def reference_videos(pipeline, text, image=None, seeds=(7,), steps=4, output_type="latent", **arguments):
    return pipeline(
        picture() if image is None else image,
        text,
        generator=generators(*seeds),
        num_inference_steps=steps,
        num_videos_per_prompt=len(seeds),
        output_type=output_type,
        **arguments,
    ).frames


def params(seed=7, steps=4, output_type="latent", **values):
    return OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, output_type=output_type, **values)


def stacked(output):
    return torch.stack(output.images)


def pipeline_of(omni):
    return omni._engine._executor._worker._runner.pipeline


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("height", "width", "num_frames"), [(32, 64, 5), (64, 32, 9), (32, 32, 1)])
def test_latents_match_diffusers(omnis, references, form, height, width, num_frames):
    size = {"height": height, "width": width, "num_frames": num_frames}
    expected = reference_videos(references[form], LONG, negative_prompt="blurry", **size)
    output = omnis[form].generate(prompt(LONG, negative_prompt="blurry"), params(**size))[0]
    assert_same_latents(stacked(output), expected)


@pytest.mark.parametrize("form", FORMS)
def test_latents_without_guidance_match_diffusers(omnis, references, form):
    expected = reference_videos(references[form], SHORT, guidance_scale=1.0, **SMALL)
    assert_same_latents(stacked(omnis[form].generate(prompt(), params(guidance_scale=1.0, **SMALL))[0]), expected)


@pytest.mark.parametrize("form", FORMS)
def test_videos_match_diffusers(omnis, references, form):
    expected = reference_videos(references[form], SHORT, output_type="pil", **SMALL)
    output = omnis[form].generate(prompt(), params(output_type="pil", **SMALL))[0]
    assert_same_pictures(output.images[0], expected[0])


def test_both_experts_and_their_scales_match_diffusers(omnis, references):
    scales = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    expected = reference_videos(references["wan2.2"], SHORT, **scales, **SMALL)
    assert_same_latents(stacked(omnis["wan2.2"].generate(prompt(), params(**scales, **SMALL))[0]), expected)


@pytest.mark.parametrize("form", ["wan2.1", "ti2v"])
def test_output_i_uses_seed_plus_i(omnis, references, form):
    # diffusers repeats the image features for prompts and not for videos, so that two videos are two calls.
    expected = torch.cat([reference_videos(references[form], SHORT, seeds=(seed,), **SMALL) for seed in (7, 8)])
    both = stacked(omnis[form].generate(prompt(), params(num_outputs_per_prompt=2, **SMALL))[0])
    assert_same_latents(both, expected)


@pytest.mark.parametrize("form", ["wan2.2", "ti2v"])
def test_given_latents_match_diffusers(omnis, references, form):
    shape = (1, 8, 2, 2, 4) if form == "ti2v" else (1, 4, 2, 4, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = latents.clone()
    expected = reference_videos(references[form], SHORT, latents=latents.clone(), **SMALL)
    assert_same_latents(stacked(omnis[form].generate(prompt(), params(latents=latents, **SMALL))[0]), expected)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("form", ["wan2.1", "ti2v"])
def test_bfloat16_matches_diffusers(folders, form):
    expected = reference_videos(load_reference(folders[form], torch.bfloat16), SHORT, **SMALL)
    with Omni(str(folders[form]), dtype="bfloat16") as omni:
        output = omni.generate(prompt(), params(**SMALL))[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


@pytest.mark.parametrize("form", ["ti2v", "ti2v as t2v"])
def test_the_first_latent_frame_is_the_picture_at_every_step(omnis, form):
    omni, pipeline = omnis[form], pipeline_of(omnis[form])
    request = omni._engine.validate(prompt(), params(**SMALL))
    assert "multi_modal_data" not in request.prompt, "a file that is read is not kept"
    with torch.inference_mode():
        encoded = encode_pixels(pipeline.vae, request.extra["pixels"])
        decoded = decode_latents(pipeline.vae, encoded)
    latents = stacked(omni.generate(prompt(), params(steps=12, **SMALL))[0])
    torch.testing.assert_close(latents[:, :, :1], encoded, rtol=1e-5, atol=1e-5)
    assert relative_difference(latents[:, :, 1:], encoded) > 0.1
    video = omni.generate(prompt(), params(output_type="pt", **SMALL))[0].images[0]
    torch.testing.assert_close(video[:1], (decoded[0] * 0.5 + 0.5).clamp(0, 1).transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_another_picture_gives_another_video(omnis, form):
    first = stacked(omnis[form].generate(prompt(), params(**SMALL))[0])
    other = stacked(omnis[form].generate(prompt(image=picture().rotate(180)), params(**SMALL))[0])
    assert relative_difference(first[:, :, -1], other[:, :, -1]) > 1e-3


def test_a_picture_of_any_kind_is_taken_as_its_colours(omnis):
    expected = stacked(omnis["wan2.1"].generate(prompt(), params(**SMALL))[0])
    array = np.asarray(picture())
    opaque = picture()
    opaque.putalpha(255)
    for image in (array, array / np.float32(255), opaque):
        assert torch.equal(stacked(omnis["wan2.1"].generate(prompt(image=image), params(**SMALL))[0]), expected)


@pytest.mark.parametrize(
    ("form", "given", "size"),
    [
        ("wan2.2", {}, (496, 800)),
        ("ti2v", {}, (736, 1216)),
        ("wan2.2", {"height": 32}, (32, 48)),
        ("wan2.2", {"width": 32}, (16, 32)),
        ("wan2.2", {"height": 32, "width": 32}, (32, 32)),
    ],
)
def test_a_size_that_is_left_open_has_the_proportions_of_the_picture(omnis, form, given, size):
    pre_process = get_wan_i2v_pre_process_func(omnis[form].od_config)
    request = OmniDiffusionRequest(prompts=[prompt()], sampling_params=OmniDiffusionSamplingParams(**given))
    assert pre_process(request).extra["pixels"].shape[-2:] == size
    assert (request.sampling_params.height, request.sampling_params.width) == size


@pytest.mark.parametrize("form", ["wan2.1", "wan2.2", "ti2v"])
def test_picture_and_prompts_are_encoded_once_for_all_outputs(omnis, monkeypatch, form):
    pipeline, calls = pipeline_of(omnis[form]), []
    encoders = {"vae": (pipeline.vae, "encode"), "text": (pipeline.text_encoder, "forward")}
    if form == "wan2.1":
        encoders["image"] = (pipeline.image_encoder, "forward")
    for name, (module, method) in encoders.items():
        original = getattr(module, method)

        def recorded(*arguments, _name=name, _original=original, **options):
            calls.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(module, method, recorded)
    omnis[form].generate(prompt(), params(num_outputs_per_prompt=3, **SMALL))
    assert sorted(calls) == sorted(["vae", "text", "text", *(["image"] if form == "wan2.1" else [])])


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_batch_gives_what_its_requests_give_alone(omnis, form):
    mixed = [
        (prompt(), params(seed=1, **SMALL)),
        (prompt(LONG, picture(30, 90, seed=1)), params(seed=2, steps=7, guidance_scale=2.0, **SMALL)),
        (prompt("dark", picture(seed=2)), params(seed=3, steps=5, guidance_scale=1.0, **SMALL)),
        (prompt(), params(seed=4, num_outputs_per_prompt=2, **SMALL)),
    ]
    if form == "ti2v as t2v":
        mixed.append((SHORT, params(seed=5, steps=6, **SMALL)))
    together = omnis[form].generate([text for text, _ in mixed], [values for _, values in mixed])
    for (text, values), output in zip(mixed, together, strict=True):
        assert_same_latents(stacked(output), stacked(omnis[form].generate(text, values)[0]), 2e-5)


@pytest.mark.parametrize(
    ("form", "given", "param"),
    [
        ("wan2.2", SHORT, "image"),
        ("ti2v", SHORT, "image"),
        ("wan2.2", {"prompt": SHORT, "multi_modal_data": {}}, "image"),
        ("wan2.2", prompt(image="/etc/hostname"), "image"),
        ("wan2.1", prompt(image=b"no picture"), "image"),
        ("wan2.1", prompt(image=[picture(), picture()]), "image"),
        ("ti2v as t2v", prompt(image=np.zeros((4, 4, 7), np.uint8)), "image"),
        ("wan2.2", {"prompt": SHORT, "multi_modal_data": {"image": picture(), "video": 1}}, "video"),
    ],
)
def test_what_is_no_picture_is_refused_before_any_work(omnis, form, given, param):
    with pytest.raises(InvalidRequestError) as caught:
        omnis[form].generate(given, params(**SMALL))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("form", "file", "changes", "message"),
    [
        ("wan2.2", "transformer/config.json", {"in_channels": 8}, "in_channels=8 must be 12"),
        ("wan2.1", "transformer/config.json", {"pos_embed_seq_len": 34}, "pos_embed_seq_len=34"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(folders, tmp_path, form, file, changes, message):
    folder = shutil.copytree(folders[form], tmp_path / "changed")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InvalidModelFolderError, match=message):
        Omni(str(folder))


def test_an_image_encoder_without_its_processor_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["wan2.1"], tmp_path / "changed", ignore=shutil.ignore_patterns("image_processor"))
    with pytest.raises(InvalidModelFolderError, match="image_processor"):
        Omni(str(folder))
