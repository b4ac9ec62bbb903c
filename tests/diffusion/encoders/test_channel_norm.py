from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from tests.diffusion.encoders.test_causal_conv import FORMS, SIZES, drawn
from tests.tiny import initialize
from vllm_omni.diffusion.encoders.channel_norm import use_squared_sums
from vllm_omni.entrypoints.omni import Omni


def refuse(*_arguments, **_keywords):
    raise AssertionError("a vector norm over channels ran")


@pytest.mark.parametrize(("model_class", "extra"), FORMS)
@torch.no_grad()
def test_an_autoencoder_gives_the_same_pixels_and_latents(model_class, extra, monkeypatch):
    vae = initialize(model_class(**SIZES, temperal_downsample=[False, True, True], **extra), 0)
    latents, pixels = drawn(2, 4, 2, 6, 4), drawn(1, 3, 5, 32, 48)
    decoded, encoded = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mean
    use_squared_sums(vae)
    monkeypatch.setattr(torch.nn.functional, "normalize", refuse)
    torch.testing.assert_close(vae.decode(latents).sample, decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, encoded, atol=1e-5, rtol=1e-4)
    assert decoded.std() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
@torch.no_grad()
def test_values_of_every_size_are_normalised_as_before(dtype, scale):
    norm = WanRMS_norm(16, images=False, bias=True)
    norm.gamma.copy_(drawn(16, 1, 1, 1))
    norm.bias.copy_(drawn(16, 1, 1, 1) + 1)
    norm = norm.to(dtype)
    x = (scale * drawn(2, 16, 2, 3, 5)).to(dtype)
    expected = norm(x)
    use_squared_sums(norm)
    torch.testing.assert_close(norm(x), expected)


def test_a_pipeline_on_a_cpu_has_them(qwen_omni: Omni, monkeypatch):
    vae = qwen_omni._engine._executor._worker._runner.pipeline.vae
    monkeypatch.setattr(torch.nn.functional, "normalize", refuse)
    with torch.no_grad():
        vae.decode(torch.zeros(1, vae.config.z_dim, 1, 4, 4))
