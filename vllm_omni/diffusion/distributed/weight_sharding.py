"""Weights that no rank holds whole: FSDP2 of repeated blocks, of transformers with HSDP and of text encoders.

A block's weights are gathered before it runs and let go after it, so that a rank holds its part of all blocks and the
whole of one or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from transformers import PreTrainedModel

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import ParallelGroups
from vllm_omni.diffusion.distributed.rank_status import waiting_for


def shard_weights(pipeline: nn.Module, od_config: OmniDiffusionConfig, groups: ParallelGroups) -> list[nn.Module]:
    """Leave to each rank its part of the weights that the configuration shards, and move what is left to its device.

    Encoders of transformers are sharded over all ranks, which encode a prompt together, wherever the denoiser is split
    too. With ``use_hsdp``, denoisers are sharded over the ranks of ``groups.weights``, which run the same blocks; these
    are returned.
    """
    use_hsdp = od_config.parallel_config.use_hsdp
    if groups.world_mesh is None or not (use_hsdp or groups.tp.size > 1):
        return []
    for encoder in _encoders(pipeline):
        # Not the encoder itself: transformers knows its models by their exact classes, which FSDP changes.
        _shard_blocks(_blocks(encoder, _no_split_names(encoder)), groups.world_mesh)
    if not use_hsdp:
        return []
    transformers = [module for module in pipeline.modules() if _repeated_names(module)]
    for transformer in transformers:
        blocks = _blocks(transformer, _repeated_names(transformer))
        if od_config.cache.cache_backend is not None:
            # A step cache computes with the first block's modulation while the block does not run.
            blocks = blocks[1:]
        sharded = _shard_blocks(blocks, groups.weights_mesh)
        # What is outside of the blocks stays whole: it is small, and parts of it are used outside of a forward.
        outside = {parameter for parameter in transformer.parameters() if parameter not in sharded}
        for tensor in (*outside, *transformer.buffers()):
            tensor.data = tensor.data.to(od_config.torch_device)
        # The root lets one block's weights arrive while the block before it computes.
        fully_shard(transformer, mesh=groups.weights_mesh, ignored_params=outside)
    return transformers


class _AllGather(DefaultAllGather):
    """FSDP's own, which tells that this rank waits for the others."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.distributed.Work | None:
        with waiting_for("ranks"):
            return super().__call__(*args, **kwargs)


def _encoders(pipeline: nn.Module) -> list[nn.Module]:
    """Models of transformers that the pipeline holds, each with the models that it holds itself.

    Autoencoders of diffusers name layers to be kept in one piece as well; they stay whole, for not all ranks decode.
    """
    found: list[nn.Module] = []
    for module in pipeline.modules():
        if isinstance(module, PreTrainedModel) and not any(module in set(outer.modules()) for outer in found):
            found.append(module)
    return found


def _no_split_names(module: nn.Module) -> set[str]:
    """Classes of layers that transformers names as those to be kept in one piece; every model of it has the entry."""
    return set(getattr(module, "_no_split_modules", None) or ())


def _repeated_names(module: nn.Module) -> set[str]:
    """Classes that a denoiser names as its blocks; other modules have no such entry."""
    return set(getattr(type(module), "_repeated_blocks", ()))


def _blocks(module: nn.Module, names: set[str]) -> list[nn.Module]:
    return [block for block in module.modules() if type(block).__name__ in names]


def _shard_blocks(blocks: Sequence[nn.Module], mesh: DeviceMesh | None) -> set[nn.Parameter]:
    """The parameters that are sharded from now on."""
    sharded: set[nn.Parameter] = set()
    for block in blocks:
        dtypes = [parameter.dtype for parameter in block.parameters()]
        # FSDP gathers tensors of one dtype at once; the few of another are small tables.
        common = max(set(dtypes), key=dtypes.count)
        whole = {parameter for parameter in block.parameters() if parameter.dtype != common}
        fully_shard(block, mesh=mesh, ignored_params=whole).set_custom_all_gather(_AllGather())
        sharded.update(parameter for parameter in block.parameters() if parameter not in whole)
    return sharded
