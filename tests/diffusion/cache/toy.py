"""A small model in stages, whose blocks record which rows they compute."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from vllm_omni.diffusion.cache.apply import CachedForward
from vllm_omni.diffusion.denoise import DenoiseState, denoise_step
from vllm_omni.diffusion.guidance import Guidance, classifier_free
from vllm_omni.diffusion.schedulers.flow_match import FlowMatchEuler
from vllm_omni.diffusion.staged_forward import BlockSpan, StagedForward

WIDTH, TOKENS, NUM_BLOCKS = 8, 5, 4


class Block(nn.Module):
    """Image tokens attend to the real tokens of the text, and both change."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5, requires_grad=False)
        self.num_rows = []

    def forward(self, image, text, time, mask):
        self.num_rows.append(len(image))
        weights = (image @ text.transpose(1, 2)).masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
        mixed = torch.tanh((image + weights @ text) @ self.weight)
        return image + time[:, None, None] * mixed, text + torch.tanh(text @ self.weight)


class Toy(nn.Module):
    """The second half of the blocks sees one stream, image first, as single-stream blocks do."""

    _repeated_blocks = ["Block"]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(seed) for seed in range(NUM_BLOCKS)])

    def forward(self, latents, timestep, text, mask):
        return self.stages(latents, timestep, text, mask).run()

    def stages(self, latents, timestep, text, mask):
        half = NUM_BLOCKS // 2
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        time = timestep / 1000

        def run_single(block, streams, row_inputs, _):
            (tokens,) = streams
            return (torch.cat(block(tokens[:, :TOKENS], tokens[:, TOKENS:], *row_inputs), dim=1),)

        return StagedForward(
            streams=(latents, text),
            row_inputs=(time, mask),
            spans=(
                BlockSpan(blocks=self.blocks[:half], call=lambda block, streams, rows, _: block(*streams, *rows)),
                BlockSpan(
                    blocks=self.blocks[half:], call=run_single, enter=lambda streams: (torch.cat(streams, dim=1),)
                ),
            ),
            modulated_input=lambda: latents * (1 + time[:, None, None]),
            output_tokens=lambda streams: streams[0][:, :TOKENS],
            finish=lambda tokens, row_inputs: tokens * (0.5 + row_inputs[0][:, None, None]),
        )

    def computed_rows(self, block=NUM_BLOCKS // 2):
        return self.blocks[block].num_rows


class ToyPipeline(nn.Module):
    sequence_conditions = {"text": "mask"}

    def __init__(self, cache=None):
        super().__init__()
        self.transformer = Toy()
        self.fails = False
        if cache is not None:
            extract = Toy.stages
            self.transformer.forward = CachedForward("transformer", self.transformer, extract, cache)

    def predict(self, latents, timestep, conditions):
        output = self.transformer(latents, timestep, **conditions)
        if self.fails:
            raise RuntimeError("no memory")
        return output


def state(seed=0, num_steps=8, num_outputs=1, text_length=3, guided=False):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    sigmas = torch.linspace(1, 0, num_steps + 1)
    latents = draw(num_outputs, TOKENS, WIDTH)
    branches = tuple({"text": draw(1, length, WIDTH)} for length in (text_length, 2)[: 1 + guided])
    guidance = Guidance(scale=torch.full((num_steps,), 2.0), combine=classifier_free) if guided else None
    return DenoiseState(
        request_id=str(seed),
        latents=latents,
        sigmas=sigmas,
        timesteps=sigmas[:-1] * 1000,
        branches=branches,
        sampler=FlowMatchEuler(),
        guidance=guidance,
        height=8,
        width=8,
    )


def finish(pipeline, *states):
    """Run the requests to their ends together, and return their latents."""
    while any(not state.is_done for state in states):
        denoise_step([state for state in states if not state.is_done], pipeline)
    return [state.latents for state in states]
