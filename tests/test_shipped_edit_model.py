"""The editing checkpoint that ships with the package, through the engine, the command line and diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

from tests.parity import assert_same_pictures, generators
from tests.tiny_qwen_edit import reference_pipeline
from tools.shapes import scenes
from tools.shapes_edit.judge import judge_edit
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.omni import SHIPPED_MODELS

FOLDER = SHIPPED_MODELS["image-edit"]
SOURCE = scenes.Scene(
    (scenes.Thing("red", "circle", "large", 72, 80, 96), scenes.Thing("blue", "square", "", 184, 168, 64)), ("yellow",)
)
DEMO_INSTRUCTION = "make the circle green"
SEED = 1


@pytest.fixture(scope="module")
def source() -> Image.Image:
    return Image.fromarray(scenes.render(SOURCE))


@pytest.fixture(scope="module")
def omni():
    with Omni(task="image-edit") as shipped:
        yield shipped


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16e6


@pytest.mark.parametrize("text", [DEMO_INSTRUCTION, "remove the square", "add a small purple star on the right"])
def test_a_picture_is_changed_as_its_instruction_says_and_not_otherwise(omni, source, text):
    scene = SOURCE if "add" not in text else scenes.Scene(SOURCE.things[:1], SOURCE.background)
    prompt = {"prompt": text, "multi_modal_data": {"image": Image.fromarray(scenes.render(scene))}}
    (output,) = omni.generate(prompt, OmniDiffusionSamplingParams(seed=SEED))
    verdict = judge_edit(output.images[0], scene, text)
    assert verdict.right, verdict.reasons


def test_its_own_defaults_are_used(omni, source):
    request = omni.resolve({"prompt": DEMO_INSTRUCTION, "multi_modal_data": {"image": source}})
    params = request.sampling_params
    assert (params.height, params.width, params.true_cfg_scale) == (1024, 1024, 1.0)


def test_diffusers_draws_the_same_picture_from_the_same_folder(omni, source):
    reference = reference_pipeline(QwenImageEditPlusPipeline, FOLDER)
    expected = reference(
        image=[source],
        prompt=DEMO_INSTRUCTION,
        true_cfg_scale=1.0,
        num_inference_steps=3,
        generator=generators(SEED)[0],
    ).images
    prompt = {"prompt": DEMO_INSTRUCTION, "multi_modal_data": {"image": source}}
    (output,) = omni.generate(prompt, OmniDiffusionSamplingParams(num_inference_steps=3, seed=SEED))
    assert_same_pictures(output.images, expected)


def test_the_command_edits_a_picture_without_a_model_named(source, tmp_path: Path):
    source.save(tmp_path / "in.png")
    output = tmp_path / "out.png"
    arguments = ["--task", "image-edit", DEMO_INSTRUCTION, "--image", str(tmp_path / "in.png"), "--seed", str(SEED)]
    main(["generate", *arguments, "--output", str(output)])
    verdict = judge_edit(Image.open(output), SOURCE, DEMO_INSTRUCTION)
    assert verdict.right, verdict.reasons


def test_a_picture_of_another_aspect_is_brought_to_sides_that_the_latents_divide(omni):
    request = omni.resolve(
        {"prompt": "make the circle green", "multi_modal_data": {"image": Image.new("RGB", (480, 400))}}
    )
    assert (request.sampling_params.width, request.sampling_params.height) == (1152, 960)
