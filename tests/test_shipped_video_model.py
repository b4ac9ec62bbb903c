"""The video checkpoint that ships with the package, through the command line, the engine and diffusers."""

from __future__ import annotations

import av
import pytest
import torch
from diffusers import WanPipeline

from tests.parity import assert_same_pictures, generators
from tools.shapes_wan.judge import judge
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.omni import SHIPPED_MODELS

MODEL = SHIPPED_MODELS["text-to-video"]
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def omni():
    with Omni(task="text-to-video") as shipped:
        yield shipped


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 12e6


def test_the_command_makes_a_video_that_plays_and_shows_what_its_prompt_says(tmp_path, capsys):
    path = tmp_path / "x.mp4"
    assert main(["generate", PROMPT, "--task", "text-to-video", "--seed", "1", "--output", str(path)]) == 0
    assert "128 x 128 x 16 frames, 20 steps, seed 1" in capsys.readouterr().out
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 8, 16)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert [frame.shape for frame in frames] == [(128, 128, 3)] * 16
    verdict = judge(frames, PROMPT)
    assert verdict.right, verdict.reasons


def test_another_number_of_frames_is_taken(omni):
    (output,) = omni.generate(PROMPT, OmniDiffusionSamplingParams(num_frames=9, num_inference_steps=2, seed=1))
    assert len(output.images[0]) == 9


def test_diffusers_makes_the_same_frames_from_the_same_folder(omni):
    prompts = [PROMPT, "a purple star moving up on a yellow background"]
    reference = WanPipeline.from_pretrained(MODEL)
    reference.set_progress_bar_config(disable=True)
    # Where nothing is packed along time, diffusers "rounds" a number of frames up to the next: 15 make 16.
    expected = reference(
        prompts,
        height=128,
        width=128,
        num_frames=15,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=generators(1, 1),
        output_type="pil",
    ).frames
    outputs = omni.generate(prompts, OmniDiffusionSamplingParams(num_inference_steps=4, seed=1))
    for output, frames in zip(outputs, expected, strict=True):
        assert len(frames) == 16
        assert_same_pictures(output.images[0], frames)


def test_batched_and_alone_the_frames_are_the_same(omni):
    prompts = [PROMPT, "a green cross moving left on a white background"]
    params = [OmniDiffusionSamplingParams(num_inference_steps=n, seed=n, output_type="latent") for n in (2, 3)]
    together = omni.generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        alone = omni.generate(prompt, one)[0].images[0]
        torch.testing.assert_close(output.images[0], alone, atol=1e-4, rtol=1e-4)
