"""Latents: drawing the initial noise, and the layouts that transformers take them in.

Shapes: B batch, C latent channels, H and W latent height and width, P patch side, all in latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidRequestError


def initial_noise(
    request: OmniDiffusionRequest, sample_shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Gaussian noise of a request, ``[num_outputs, *sample_shape]`` on ``device``.

    Output i is drawn on the CPU in ``dtype`` from its own generator with seed ``seed + i``: the same numbers on every
    device, in every batch, and in a diffusers pipeline that is given ``torch.Generator("cpu").manual_seed(seed + i)``.
    """
    generator = request.sampling_params.generator
    if generator is not None:
        shape = (request.num_outputs, *sample_shape)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    assert request.seeds is not None, "admission gives every request without a generator a seed"
    samples = [
        torch.randn((1, *sample_shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
        for seed in request.seeds
    ]
    return torch.cat(samples).to(device)


def check_given_latents(request: OmniDiffusionRequest, sample_shape: Sequence[int]) -> None:
    """Raises ``InvalidRequestError`` unless given latents are ``[num_outputs, *sample_shape]`` of finite floats."""
    latents = request.sampling_params.latents
    if latents is None:
        return
    expected = [request.num_outputs, *sample_shape]
    if list(latents.shape) != expected or not latents.is_floating_point():
        raise InvalidRequestError(
            f"latents has shape {list(latents.shape)} and dtype {latents.dtype}; this request needs floats of shape"
            f" {expected}",
            param="latents",
        )
    if not bool(torch.isfinite(latents).all()):
        raise InvalidRequestError("latents holds NaN or infinite values; all must be finite", param="latents")


def check_num_frames(request: OmniDiffusionRequest, temporal_factor: int) -> None:
    """Raises ``InvalidRequestError`` unless num_frames is one more than a multiple of ``temporal_factor``.

    A causal video autoencoder keeps the first frame for itself and packs the others by ``temporal_factor``.
    """
    num_frames = request.sampling_params.num_frames
    assert num_frames is not None, "a video model has a default of num_frames"
    remainder = (num_frames - 1) % temporal_factor
    if remainder:
        below = num_frames - remainder
        raise InvalidRequestError(
            f"num_frames={num_frames} must be one more than a multiple of {temporal_factor}; the nearest are {below}"
            f" and {below + temporal_factor}",
            param="num_frames",
        )


def pack_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """``[B, C, H, W] -> [B, H/P * W/P, C*P*P]``: one token per P x P patch, row by row."""
    batch, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    patches = latents.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpack_latents(tokens: torch.Tensor, rows: int, columns: int, patch_size: int) -> torch.Tensor:
    """``[B, rows * columns, C*P*P] -> [B, C, rows * P, columns * P]``: the inverse of :func:`pack_latents`."""
    batch, _, features = tokens.shape
    channels = features // patch_size**2
    patches = tokens.reshape(batch, rows, columns, channels, patch_size, patch_size)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * patch_size, columns * patch_size)


def unit_timestep(timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``timestep [B] in [0, 1000] -> [B] in [0, 1]``, rounded to ``dtype`` before the division.

    So do the diffusers pipelines of Qwen-Image and FLUX.1.
    """
    return timestep.to(dtype) / 1000
