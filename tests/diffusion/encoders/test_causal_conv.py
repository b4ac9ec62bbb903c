from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from tests.tiny import initialize
from vllm_omni.diffusion.encoders.causal_conv import use_single_frame_convolutions

SIZES = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
FORMS = [
    (AutoencoderKLQwenImage, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
    (AutoencoderKLWan, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
]


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("model_class", "extra"), FORMS)
@pytest.mark.parametrize("num_frames", [1, 2])
@torch.no_grad()
def test_results_are_those_of_the_3d_convolutions(model_class, extra, num_frames):
    vae = initialize(model_class(**SIZES, temperal_downsample=[False, True, True], **extra), 0)
    latents, pixels = drawn(2, 4, num_frames, 6, 4), drawn(2, 3, 4 * num_frames - 3, 32, 48)
    decoded, encoded = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mean
    use_single_frame_convolutions(vae)
    torch.testing.assert_close(vae.decode(latents).sample, decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, encoded, atol=1e-5, rtol=1e-4)
    assert decoded.std() > 0.05


@torch.no_grad()
def test_one_frame_runs_no_3d_convolution(monkeypatch):
    vae = initialize(AutoencoderKLQwenImage(**SIZES, temperal_downsample=[False, True, True]), 0)
    use_single_frame_convolutions(vae)

    def refuse(*_arguments):
        raise AssertionError("a 3D convolution ran")

    monkeypatch.setattr(torch.nn.functional, "conv3d", refuse)
    assert vae.decode(drawn(1, 4, 1, 6, 4)).sample.shape == (1, 3, 1, 48, 32)
