"""Autoencoders in channels-last memory give what they gave, by torch's functions and by the kernels."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tests.tiny import initialize
from tests.tiny_flux import autoencoder_kl
from vllm_omni.diffusion.encoders import channels_last
from vllm_omni.diffusion.encoders.causal_conv import use_single_frame_convolutions
from vllm_omni.diffusion.encoders.channels_last import use_channels_last
from vllm_omni.diffusion.layers import kernels

VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
VIDEO |= {"temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def tiled():
    vae = autoencoder_kl()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
    return vae


# name: (autoencoder, shape of latents)
AUTOENCODERS = {
    "pictures": (autoencoder_kl, (2, 4, 6, 4)),
    "pictures in tiles": (tiled, (1, 4, 9, 6)),
    "one frame": (lambda: AutoencoderKLQwenImage(**VIDEO), (2, 4, 1, 6, 4)),
    "frames": (lambda: AutoencoderKLWan(**VIDEO), (1, 4, 3, 6, 4)),
    "frames of residual blocks": (
        lambda: AutoencoderKLWan(**VIDEO, is_residual=True, in_channels=12, out_channels=12, patch_size=2),
        (1, 4, 2, 6, 4),
    ),
}


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both_ways(vae, latents):
    """Its pixels, and the latents of pixels of as many frames."""
    pixels = vae.decode(latents).sample
    return pixels, vae.encode(torch.tanh(drawn(*pixels.shape, seed=2)).to(pixels)).latent_dist.mean


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("by", ["functions of torch", "kernels"])
@torch.no_grad()
def test_pixels_and_latents_stay_the_same(name, by, monkeypatch):
    build, shape = AUTOENCODERS[name]
    vae = initialize(build(), 0)
    expected = both_ways(vae, drawn(*shape))
    if by == "kernels":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled here, and do not take tensors of a CPU")
        monkeypatch.setattr(kernels, "take", lambda x: True)
    use_channels_last(vae)
    if name == "one frame":
        use_single_frame_convolutions(vae)
    for ours, theirs in zip(both_ways(vae, drawn(*shape)), expected, strict=True):
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_norm_but_those_before_attention_computes_the_activation_after_it(name):
    vae = AUTOENCODERS[name][0]()
    use_channels_last(vae)
    assert not any(isinstance(module, nn.SiLU) for module in vae.modules())
    plain = {path for path, module in vae.named_modules() if getattr(module.forward, "silu", None) is False}
    assert plain
    assert all("attention" in path for path in plain)


def test_every_residual_block_of_pictures_adds_the_biases_itself():
    vae = autoencoder_kl()
    use_channels_last(vae)
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    assert len(blocks) > 8
    assert all(isinstance(block.forward, channels_last._ResidualForward) for block in blocks)


def test_an_activation_that_others_use_stays_where_it_is():
    vae = autoencoder_kl()
    block = vae.decoder.mid_block.resnets[0]
    block.time_emb_proj = nn.Linear(4, 4)
    use_channels_last(vae)
    assert isinstance(block.nonlinearity, nn.SiLU)
    assert not block.norm1.forward.silu


def test_what_no_kernel_takes_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "take", lambda x: True)
    model = nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.Upsample(scale_factor=2.0, mode="nearest"))
    video = drawn(1, 4, 3, 2, 2)
    expected = model(video)
    use_channels_last(model)
    torch.testing.assert_close(model(video), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_on_a_gpu_pixels_are_as_near_to_float32_as_before(name):
    build, shape = AUTOENCODERS[name]
    torch.manual_seed(0)
    expected, *others = (
        both_ways(change(initialize(build(), 0)).to("cuda", dtype), drawn(*shape).to("cuda", dtype))
        for change, dtype in (
            (lambda vae: vae, torch.float32),
            (lambda vae: vae, torch.bfloat16),
            (_changed, torch.bfloat16),
        )
    )
    for wanted, eager, ours in zip(expected, *others, strict=True):
        errors = [((got.float() - wanted).norm() / wanted.norm()).item() for got in (eager, ours)]
        assert errors[1] < max(1.2 * errors[0], 0.01)


def _changed(vae: AutoencoderKL) -> AutoencoderKL:
    use_channels_last(vae)
    return vae
