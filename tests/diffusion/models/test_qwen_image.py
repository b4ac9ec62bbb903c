"""Qwen-Image against diffusers on a tiny random checkpoint, float32 on the CPU.

``python -m pytest tests/diffusion/models/test_qwen_image.py`` is the whole comparison.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImagePipeline

from tests.parity import (
    BF16_TOLERANCE,
    assert_same_latents,
    assert_same_pictures,
    generators,
    relative_difference,
)
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.errors import InvalidRequestError

SHORT, LONG = "a red circle", "a cat holding a sign that says hello, left of a small blue square {braces}"
SIZES = [(64, 64), (64, 96), (128, 48)]


@pytest.fixture(scope="module")
def reference(qwen_folder):
    pipeline = QwenImagePipeline.from_pretrained(qwen_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_images(pipeline, prompt, seeds=(7,), steps=4, output_type="latent", **arguments):
    return pipeline(
        prompt,
        generator=generators(*seeds),
        num_inference_steps=steps,
        num_images_per_prompt=len(seeds),
        output_type=output_type,
        **arguments,
    ).images


def params(seed=7, steps=4, output_type="latent", **values):
    return OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, output_type=output_type, **values)


def stacked(output):
    return torch.stack(output.images)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("negative", [None, "blurry", ""])
def test_latents_match_diffusers(qwen_omni, reference, height, width, negative):
    expected = reference_images(reference, SHORT, negative_prompt=negative, height=height, width=width)
    prompt = {"prompt": SHORT, "negative_prompt": negative}
    output = qwen_omni.generate(prompt, params(height=height, width=width))[0]
    assert_same_latents(stacked(output), expected)


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_pictures_match_diffusers(qwen_omni, reference, negative):
    size = {"height": 64, "width": 96}
    expected = reference_images(reference, LONG, output_type="pil", negative_prompt=negative, **size)
    output = qwen_omni.generate({"prompt": LONG, "negative_prompt": negative}, params(output_type="pil", **size))[0]
    assert_same_pictures(output.images, expected)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_and_tensors_match_diffusers(qwen_omni, reference, output_type):
    expected = reference_images(reference, SHORT, output_type=output_type, height=64, width=64)[0]
    image = qwen_omni.generate(SHORT, params(output_type=output_type, height=64, width=64))[0].images[0]
    assert image.shape == expected.shape
    assert abs(image - expected).max() < 1e-4


def test_prompts_of_different_length_in_one_batch_match_diffusers(qwen_omni, reference):
    size = {"height": 64, "width": 64}
    expected = reference(
        [SHORT, LONG],
        negative_prompt=["blurry", "dark and blurry"],
        generator=generators(7, 7),
        num_inference_steps=4,
        output_type="latent",
        **size,
    ).images
    outputs = qwen_omni.generate(
        [
            {"prompt": SHORT, "negative_prompt": "blurry"},
            {"prompt": LONG, "negative_prompt": "dark and blurry"},
        ],
        params(**size),
    )
    assert_same_latents(torch.cat([stacked(output) for output in outputs]), expected)


def test_output_i_uses_seed_plus_i(qwen_omni, reference):
    size = {"height": 64, "width": 64}
    expected = reference_images(reference, SHORT, seeds=(7, 8), negative_prompt="blurry", **size)
    prompt = {"prompt": SHORT, "negative_prompt": "blurry"}
    both = stacked(qwen_omni.generate(prompt, params(num_outputs_per_prompt=2, **size))[0])
    alone = stacked(qwen_omni.generate(prompt, params(seed=8, **size))[0])
    assert_same_latents(both, expected)
    assert_same_latents(both[1:], alone, 1e-5)


def test_a_generator_draws_what_diffusers_draws(qwen_omni, reference):
    size = {"height": 64, "width": 64}
    expected = reference(
        SHORT, generator=generators(3)[0], num_inference_steps=4, output_type="latent", num_images_per_prompt=2, **size
    ).images
    given = OmniDiffusionSamplingParams(
        generator=generators(3)[0], num_inference_steps=4, output_type="latent", num_outputs_per_prompt=2, **size
    )
    assert_same_latents(stacked(qwen_omni.generate(SHORT, given)[0]), expected)


def test_given_latents_match_diffusers(qwen_omni, reference):
    latents = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1))
    size = {"height": 64, "width": 96}
    expected = reference_images(reference, SHORT, latents=latents, **size)
    assert_same_latents(stacked(qwen_omni.generate(SHORT, params(latents=latents, **size))[0]), expected)


def test_given_embeddings_match_diffusers(qwen_omni, reference):
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    negative = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    size = {"height": 64, "width": 64}
    expected = reference_images(reference, None, prompt_embeds=embeds, negative_prompt_embeds=negative, **size)
    for shape in ((1, -1, 32), (-1, 32)):
        prompt = {"prompt_embeds": embeds.view(shape), "negative_prompt_embeds": negative.view(shape)}
        assert_same_latents(stacked(qwen_omni.generate(prompt, params(**size))[0]), expected)


def test_given_sigmas_match_diffusers(qwen_omni, reference):
    size = {"height": 64, "width": 64}
    expected = reference_images(reference, SHORT, sigmas=[1.0, 0.7, 0.2], steps=3, **size)
    given = OmniDiffusionSamplingParams(sigmas=[1.0, 0.7, 0.2], seed=7, output_type="latent", **size)
    output = qwen_omni.generate(SHORT, given)[0]
    assert_same_latents(stacked(output), expected)
    assert output.receipt.num_inference_steps == 3


def test_given_timesteps_are_used_without_shift(qwen_omni):
    size = {"height": 64, "width": 64, "seed": 7, "output_type": "latent"}
    state = qwen_omni._engine.validate(SHORT, OmniDiffusionSamplingParams(timesteps=[900.0, 500.0], **size))
    prepared = qwen_omni._engine._executor._worker._runner.pipeline.prepare(state)
    torch.testing.assert_close(prepared.timesteps, torch.tensor([900.0, 500.0]))
    torch.testing.assert_close(prepared.sigmas, torch.tensor([0.9, 0.5, 0.0]))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_at_most_one_switches_guidance_off_as_in_diffusers(qwen_omni, reference, scale):
    size = {"height": 64, "width": 64}
    expected = reference_images(reference, SHORT, negative_prompt="blurry", true_cfg_scale=scale, **size)
    prompt = {"prompt": SHORT, "negative_prompt": "blurry"}
    output = qwen_omni.generate(prompt, params(true_cfg_scale=scale, **size))[0]
    assert_same_latents(stacked(output), expected)
    assert output.receipt.guidance == "none"


def test_bf16_stays_near_diffusers_in_bf16(qwen_folder):
    pipeline = QwenImagePipeline.from_pretrained(qwen_folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96}
    expected = reference_images(pipeline, LONG, negative_prompt="blurry", **size)
    with Omni(str(qwen_folder), dtype="bfloat16") as omni:
        output = omni.generate({"prompt": LONG, "negative_prompt": "blurry"}, params(**size))[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


def test_mixed_requests_give_what_they_give_alone(qwen_omni):
    cases = [
        (
            {"prompt": SHORT, "negative_prompt": "blurry"},
            params(seed=1, steps=3, true_cfg_scale=2.0, height=64, width=64),
        ),
        ({"prompt": LONG, "negative_prompt": ""}, params(seed=2, steps=5, true_cfg_scale=6.0, height=64, width=64)),
        (LONG, params(seed=3, steps=4, height=64, width=64, num_outputs_per_prompt=3)),
        (SHORT, params(seed=4, steps=2, height=96, width=64)),
    ]
    together = qwen_omni.generate([prompt for prompt, _ in cases], [values for _, values in cases])
    chunked = qwen_omni.generate([prompt for prompt, _ in cases], [values for _, values in cases], max_batch_size=2)
    for (prompt, values), in_batch, in_chunks in zip(cases, together, chunked, strict=True):
        alone = stacked(qwen_omni.generate(prompt, values)[0])
        assert_same_latents(stacked(in_batch), alone, 2e-5)
        assert_same_latents(stacked(in_chunks), alone, 2e-5)


@pytest.mark.parametrize("option", ["vae_use_slicing", "vae_use_tiling"])
def test_vae_options_match_diffusers(qwen_folder, reference, option):
    size = {"height": 320, "width": 256}
    getattr(reference.vae, {"vae_use_slicing": "enable_slicing", "vae_use_tiling": "enable_tiling"}[option])()
    expected = reference_images(reference, SHORT, seeds=(1, 2), steps=2, output_type="pil", **size)
    getattr(reference.vae, {"vae_use_slicing": "disable_slicing", "vae_use_tiling": "disable_tiling"}[option])()
    with Omni(str(qwen_folder), **{option: True}) as omni:
        values = params(seed=1, steps=2, output_type="pil", num_outputs_per_prompt=2, **size)
        output = omni.generate(SHORT, values)[0]
    assert_same_pictures(output.images, expected)
    assert option in output.receipt.accelerations


@pytest.mark.parametrize(
    ("prompt", "values", "param"),
    [
        (SHORT, {"guidance_scale": 3.5}, "guidance_scale"),
        (SHORT, {"num_frames": 5}, "num_frames"),
        (SHORT, {"max_sequence_length": 2000}, "max_sequence_length"),
        (SHORT, {"max_sequence_length": 6}, "prompt"),
        (SHORT, {"true_cfg_scale": 4.0}, "negative_prompt"),
        (SHORT, {"extra_args": {"layers": 3}}, "extra_args.layers"),
        (SHORT, {"latents": torch.zeros(1, 3, 16)}, "latents"),
        (SHORT, {"latents": torch.full((1, 16, 16), float("nan"))}, "latents"),
        ({"prompt": SHORT, "multi_modal_data": {"image": b""}}, {}, "multi_modal_data"),
        ({"prompt_embeds": torch.zeros(1, 4, 31)}, {}, "prompt_embeds"),
    ],
)
def test_what_the_model_cannot_honour_is_refused_by_name(qwen_omni, prompt, values, param):
    with pytest.raises(InvalidRequestError) as caught:
        qwen_omni.generate(prompt, OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=1, **values))
    assert caught.value.param == param


def test_an_embedded_guidance_scale_changes_the_prediction(tmp_path, qwen_folder):
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "distilled"
    shutil.copytree(qwen_folder, folder)
    config = json.loads((folder / "transformer/config.json").read_text()) | {"guidance_embeds": True}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for layer in ("linear_1", "linear_2"):
        for kind in ("weight", "bias"):
            name = f"time_text_embed.timestep_embedder.{layer}.{kind}"
            weights[name.replace("timestep_embedder", "guidance_embedder")] = weights[name].flip(0).contiguous()
    save_file(weights, file)
    with Omni(str(folder)) as omni:
        first, second = (
            stacked(omni.generate(SHORT, params(guidance_scale=scale, height=64, width=64))[0]) for scale in (1.0, 4.0)
        )
    assert (first - second).abs().max() > 1e-3
