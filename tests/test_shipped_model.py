"""The checkpoint that ships with the package, through the engine and through diffusers."""

from __future__ import annotations

import pytest
from diffusers import QwenImagePipeline

from tests.parity import assert_same_pictures, generators
from tools.shapes.judge import judge
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.omni import SHIPPED_MODEL

DEMO_PROMPT = "a red circle on a blue background"
DEMO_SEED = 1  # of `make demo`


@pytest.fixture(scope="module")
def omni():
    with Omni() as shipped:
        yield shipped


def test_it_is_small():
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.rglob("*") if path.is_file()) <= 24e6


def test_the_demo_shows_what_its_prompt_says(omni):
    (output,) = omni.generate(DEMO_PROMPT, OmniDiffusionSamplingParams(seed=DEMO_SEED))
    verdict = judge(output.images[0], DEMO_PROMPT)
    assert verdict.right, verdict.reasons


def test_its_own_defaults_are_used(omni):
    (output,) = omni.generate(DEMO_PROMPT, OmniDiffusionSamplingParams(num_inference_steps=1))
    receipt = output.receipt
    assert (receipt.height, receipt.width, receipt.guidance) == (256, 256, "classifier-free, scale 4")
    assert omni.generate("a star")[0].receipt.num_inference_steps == 20


def test_diffusers_draws_the_same_pictures_from_the_same_folder(omni):
    prompts = [DEMO_PROMPT, "a large green square left of a small purple star on a white background"]
    reference = QwenImagePipeline.from_pretrained(SHIPPED_MODEL)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        prompts,
        negative_prompt=[" ", " "],
        true_cfg_scale=4.0,
        num_inference_steps=6,
        height=256,
        width=256,
        generator=generators(1, 1),
    ).images
    outputs = omni.generate(prompts, OmniDiffusionSamplingParams(num_inference_steps=6, seed=1))
    assert_same_pictures([output.images[0] for output in outputs], expected)
