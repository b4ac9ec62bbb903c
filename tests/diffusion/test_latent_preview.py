from __future__ import annotations

import json
import re

import pytest
import torch

from vllm_omni.diffusion.denoise_state import DenoiseState
from vllm_omni.diffusion.latent_preview import PREVIEW_FILE, LatentPreview
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler
from vllm_omni.errors import InvalidModelFolderError


def test_the_preview_of_a_step_shows_the_sample_that_it_heads_for():
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(2, 6, 3, generator=generator) for _ in range(2))
    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0])
    latents = [(1 - sigma) * sample + sigma * noise for sigma in sigmas]
    state = DenoiseState(
        request_id="a",
        latents=latents[1],
        sigmas=sigmas,
        timesteps=sigmas[:-1] * 1000,
        branches=({},),
        sampler=FlowMatchEuler(),
        guidance=None,
        height=32,
        width=48,
        step_index=1,
    )
    preview = LatentPreview(
        pixels_per_token=16, weight=torch.randn(3, 12, generator=generator), bias=torch.full((12,), 0.5)
    )
    shown = preview(state, latents[0])
    assert (shown.shape, shown.dtype) == ((2, 4, 6, 3), torch.uint8)
    torch.testing.assert_close(shown, preview.colours(sample, 32, 48), atol=1, rtol=0)


def test_the_patch_of_a_token_is_laid_out_row_by_row():
    weight, bias = torch.zeros(1, 12), torch.arange(12) / 255
    shown = LatentPreview(pixels_per_token=8, weight=weight, bias=bias).colours(torch.zeros(1, 1, 1), 8, 8)
    assert shown.tolist() == [[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]]


def test_a_video_shows_its_middle_frame():
    latents = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2) / 2
    preview = LatentPreview(pixels_per_token=8, weight=torch.ones(1, 3), bias=torch.zeros(3))
    assert preview.colours(latents, 16, 16).unique().tolist() == [128]


def test_colours_may_depend_on_the_tokens_around():
    kernel = torch.zeros(9, 3)
    kernel[5, 0] = 1.0  # red is the token to the right
    latents = torch.tensor([[0.0, 0.2, 0.4, 0.6]]).reshape(1, 4, 1)
    shown = LatentPreview(pixels_per_token=8, weight=kernel, bias=torch.zeros(3), kernel=3).colours(latents, 16, 16)
    assert shown[0, :, :, 0].tolist() == [[51, 0], [153, 0]]


@pytest.mark.parametrize(
    "content",
    [
        {"weight": [[1, 2, 3]], "bias": [1, 2, 3], "pixels_per_token": 8, "kernel": 3},
        {},
        {"weight": [[1, 2]], "bias": [1], "pixels_per_token": 8},
        {"weight": 1, "bias": [], "pixels_per_token": 1},
    ],
)
def test_a_broken_map_is_refused_with_its_path(tmp_path, content):
    (tmp_path / PREVIEW_FILE).write_text(json.dumps(content))
    with pytest.raises(InvalidModelFolderError, match=re.escape(str(tmp_path / PREVIEW_FILE))):
        LatentPreview.load(str(tmp_path))
    assert LatentPreview.load(str(tmp_path / "elsewhere")) is None
