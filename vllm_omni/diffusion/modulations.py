"""Modulations of a request for many of its steps at once, from outside of the transformers.

A modulation layer multiplies one row, so that its time is that of reading its weight, as long for one row as for many.
What goes in follows from the timestep and from conditions that stay the same, so the rows of the steps ahead are known
at the first of them: one product per layer serves them all, and a forward finds its modulations as an input.

Shapes: B rows of a forward, K steps ahead, E width of the model, P modulations of all blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from vllm_omni.diffusion.compile import repeated_blocks
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.latents import unit_timestep
from vllm_omni.diffusion.layers.linear import ModulationLinear
from vllm_omni.diffusion.sequences import concatenate
from vllm_omni.diffusion.staged_forward import Conditioning, StagedForward
from vllm_omni.diffusion.step_memory import ForwardRow, PreparedSteps, current_forward_rows

# What a request holds grows with it, 220 MB for 50 steps of a large model; what it saves hardly does beyond.
STEPS_AHEAD = 64


class PreparedModulations:
    """Stands in for ``stages`` of one transformer. Outside of a denoising step it is that method."""

    def __init__(
        self, stages: Callable[..., StagedForward], layers: Mapping[nn.Module, Sequence[ModulationLinear]]
    ) -> None:
        self._stages = stages
        self._layers = layers  # of each block

    def __call__(self, *args: Any, **kwargs: Any) -> StagedForward:
        stages, rows = self._stages(*args, **kwargs), current_forward_rows()
        if rows is None or stages.conditioning is None or any(row.timesteps is None for row in rows):
            return stages
        conditioning, *others = stages.row_inputs
        assert conditioning is not None, "stages.conditioning tells how it is made"
        if len(rows) != conditioning.shape[0]:
            return stages  # the pipeline makes other rows of them
        blocks = [block for span in stages.spans for block in span.blocks]
        if not all(block in self._layers for block in blocks):
            return stages  # some are of a class that _repeated_blocks leaves out
        layers = [self._layers[block] for block in blocks]
        prepared = self._prepared(rows, stages.conditioning, list(chain.from_iterable(layers)), conditioning.dtype)
        widths = [sum(layer.output_size for layer in of_block) for of_block in layers]
        ends = accumulate(widths)
        return replace(
            stages,
            row_inputs=(concatenate(prepared), *others),
            block_parts=tuple(slice(end - width, end) for width, end in zip(widths, ends, strict=True)),
        )

    def _key(self, row: ForwardRow, conditioning: Conditioning) -> Hashable:
        """Branches and outputs whose modulations follow from the timestep alone share them."""
        is_shared = all(values is None for values in conditioning.others)
        return (id(self), 0, 0) if is_shared else (id(self), row.branch, row.output)

    def _prepared(
        self,
        rows: Sequence[ForwardRow],
        conditioning: Conditioning,
        layers: Sequence[ModulationLinear],
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """``[1, P]`` of each row. What is missing is computed at once: the weights are read but once."""
        keys = [self._key(row, conditioning) for row in rows]
        prepared = [row.memory.modulations(key, row.step_index) for row, key in zip(rows, keys, strict=True)]
        # Rows of one request that share a key need one of them.
        missing = {(id(rows[i].memory), keys[i]): i for i, values in enumerate(prepared) if values is None}
        if not missing:
            return [values for values in prepared if values is not None]
        timesteps = [_steps_ahead(rows[index]) for index in missing.values()]
        counts = [len(steps) for steps in timesteps]
        given = [_repeated(values, missing.values(), counts) for values in conditioning.others]
        inputs = conditioning.compute(unit_timestep(torch.cat(timesteps), dtype), *given)
        for index, values in zip(missing.values(), _computed(layers, inputs, counts), strict=True):
            rows[index].memory.keep_modulations(keys[index], PreparedSteps(rows[index].step_index, values))
        return self._prepared(rows, conditioning, layers, dtype)


def prepare_modulations(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> None:
    """Let the transformers of a pipeline that tell of their conditioning find their modulations prepared.

    Weights that FSDP shards exist but within their block, so there each step computes its own.
    """
    if od_config.parallel_config.use_hsdp:
        return
    for transformer, names in repeated_blocks(pipeline):
        layers = {
            block: [layer for layer in block.modules() if isinstance(layer, ModulationLinear)]
            for block in transformer.modules()
            if type(block).__name__ in names
        }
        stages = getattr(transformer, "stages", None)
        if stages is None or not all(_can_be_prepared(of_block) for of_block in layers.values()):
            continue
        for of_block in layers.values():
            for layer, end in zip(of_block, accumulate(layer.output_size for layer in of_block), strict=True):
                layer.prepared_at = end - layer.output_size
        prepared: Any = PreparedModulations(stages, layers)
        transformer.stages = prepared


def _can_be_prepared(layers: Sequence[ModulationLinear]) -> bool:
    """Whether a block has such layers, and each can tell a prepared row from its own input by the width."""
    width = sum(layer.output_size for layer in layers)
    return bool(layers) and all(layer.input_size != width for layer in layers)


def _steps_ahead(row: ForwardRow) -> torch.Tensor:
    """The timesteps of a row's next steps: ``[K]``."""
    assert row.timesteps is not None, "rows without are not prepared"
    return row.timesteps[row.step_index : row.step_index + STEPS_AHEAD]


def _repeated(values: torch.Tensor | None, rows: Collection[int], counts: Sequence[int]) -> torch.Tensor | None:
    """``[B, ...] -> [sum(counts), ...]``: each of ``rows`` as often as its count says."""
    if values is None:
        return None
    parts = [values[row : row + 1].expand(count, *values.shape[1:]) for row, count in zip(rows, counts, strict=True)]
    return concatenate(parts)


def _computed(layers: Sequence[ModulationLinear], inputs: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """``inputs [sum(counts), E] -> [count, P]`` for each count."""
    num_features = sum(layer.output_size for layer in layers)
    prepared = [inputs.new_empty(count, num_features) for count in counts]
    start = 0
    for layer in layers:
        for values, computed in zip(prepared, layer(inputs).split_with_sizes(list(counts)), strict=True):
            values[:, start : start + layer.output_size] = computed
        start += layer.output_size
    return prepared
