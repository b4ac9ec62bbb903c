"""Pipelines of an author who makes one mistake: the prompt names it."""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoise import DenoiseState
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler


class CarelessPipeline(nn.Module):
    def __init__(self, *, od_config: OmniDiffusionConfig):
        super().__init__()

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState | None:
        self.mistake = request.prompt["prompt"]
        if self.mistake == "prepare returns None":
            return None
        sigmas = torch.linspace(1, 0, request.sampling_params.num_inference_steps + 1)
        return DenoiseState(
            request_id=request.request_id,
            latents=torch.zeros(1, 3, 8, 8),
            sigmas=sigmas,
            timesteps=sigmas[:-1] * 1000,
            branches=({"sizes": ([8, 8],) if self.mistake == "a condition is a list" else (8, 8)},),
            sampler=FlowMatchEuler(),
            guidance=None,
            height=8,
            width=8,
        )

    def predict(self, latents, timestep, conditions):
        if self.mistake == "predict drops a channel":
            return latents[:, 1:]
        return None if self.mistake == "predict returns None" else latents

    def decode(self, state):
        return None if self.mistake == "decode returns None" else state.latents


class CarelessForward(nn.Module):
    def __init__(self, *, od_config: OmniDiffusionConfig):
        super().__init__()

    def forward(self, req: OmniDiffusionRequest) -> None:
        return None
