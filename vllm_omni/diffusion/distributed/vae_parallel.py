"""VAE parallelism: the tiles of a large picture are decoded by different ranks.

The pictures are those of tiled decoding on one rank: diffusers cuts the tiles and blends them as ever, and only the
calls of the decoder between the two are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vllm_omni.diffusion.distributed.collectives import all_gather_flat
from vllm_omni.diffusion.distributed.groups import RankGroup
from vllm_omni.diffusion.distributed.rank_status import waiting_for


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the decoder. Calls of the frames of a tile follow each other and share a cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tile: int


def share_tiles(pipeline: nn.Module, group: RankGroup) -> None:
    """Let the ranks of ``group`` decode tiles for each other, in all autoencoders of a pipeline."""
    if group.size == 1:
        return
    for module in pipeline.modules():
        if callable(getattr(module, "tiled_decode", None)):
            module.tiled_decode = _shared(module, group)  # type: ignore[assignment]


def _shared(vae: Any, group: RankGroup) -> Callable[..., Any]:
    tiled_decode = vae.tiled_decode

    def shared_tiled_decode(latents: torch.Tensor, return_dict: bool = True) -> Any:
        calls: list[_Call] = []
        with _decoder_forward(vae, _recorder(vae, calls)):
            tiled_decode(latents)
        owners = [call.tile % group.size for call in calls]
        mine = [
            vae.decoder(*call.args, **call.kwargs)
            for call, owner in zip(calls, owners, strict=True)
            if owner == group.rank
        ]
        outputs = _of_all_ranks(mine, owners, latents, group)
        with _decoder_forward(vae, lambda *args, **kwargs: next(outputs)):
            return tiled_decode(latents, return_dict=return_dict)

    return shared_tiled_decode


def _recorder(vae: Any, calls: list[_Call]) -> Callable[..., torch.Tensor]:
    """Notes the calls and returns nothing but zeros: what a tile is cut from does not depend on what is decoded."""

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        tile, cache = args[0], kwargs.get("feat_cache")
        begins = cache is None or not calls or cache is not calls[-1].kwargs.get("feat_cache")
        index = 0 if not calls else calls[-1].tile + begins
        calls.append(_Call(args, kwargs, index))
        patch = getattr(vae.config, "patch_size", None) or 1  # a decoder of patches has their pixels as channels
        side = vae.spatial_compression_ratio // patch if hasattr(vae, "spatial_compression_ratio") else 1
        height, width = tile.shape[-2] * side, tile.shape[-1] * side
        return tile.new_zeros(tile.shape[0], patch**2, *tile.shape[2:-2], height, width)

    return record


def _of_all_ranks(
    mine: Sequence[torch.Tensor], owners: Sequence[int], latents: torch.Tensor, group: RankGroup
) -> Iterator[torch.Tensor]:
    """The outputs of all calls in order."""
    shapes: list[list[torch.Size]] = [[] for _ in range(group.size)]
    with waiting_for("ranks"):
        dist.all_gather_object(shapes, [output.shape for output in mine], group=group.process_group)
    # The decoder answers in the dtype that it is given.
    flat = torch.cat([output.reshape(-1) for output in mine]) if mine else latents.new_empty(0)
    lengths = [sum(shape.numel() for shape in of_rank) for of_rank in shapes]
    parts = all_gather_flat(flat, lengths, group)
    queues = [
        iter(
            [
                piece.view(shape)
                for piece, shape in zip(part.split([shape.numel() for shape in of_rank]), of_rank, strict=True)
            ]
        )
        for part, of_rank in zip(parts, shapes, strict=True)
    ]
    return (next(queues[owner]) for owner in owners)


@contextmanager
def _decoder_forward(vae: Any, forward: Callable[..., Any]) -> Iterator[None]:
    original = vae.decoder.forward
    vae.decoder.forward = forward
    try:
        yield
    finally:
        vae.decoder.forward = original
