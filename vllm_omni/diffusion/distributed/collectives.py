"""Collectives over tensors that need not be of the same length on every rank.

Shapes: P ranks of the group, ``...`` anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from vllm_omni.diffusion.distributed.groups import RankGroup
from vllm_omni.diffusion.distributed.rank_status import waiting_for

# Its name until torch 2.12.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce_sum(x: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The sum of the ranks' ``x [...]``, the same bits on every rank."""
    if group.size == 1:
        return x
    total = x.clone()
    with waiting_for("ranks"):
        dist.all_reduce(total, group=group.process_group)
    return total


def all_gather_flat(x: torch.Tensor, lengths: Sequence[int], group: RankGroup) -> list[torch.Tensor]:
    """``x [L_rank] -> [L_0], [L_1], ...``: what each rank has. ``lengths`` are the same on every rank."""
    longest = max(lengths)
    if x.shape[0] < longest:
        x = torch.nn.functional.pad(x, (0, longest - x.shape[0]))
    gathered = x.new_empty(group.size * longest)
    with waiting_for("ranks"):
        _all_gather_single(gathered, x.contiguous(), group=group.process_group)
    return [part[:length] for part, length in zip(gathered.split(longest), lengths, strict=True)]


def all_gather_along(x: torch.Tensor, dim: int, lengths: Sequence[int], group: RankGroup) -> torch.Tensor:
    """``x [..., L_rank, ...] -> [..., sum(L), ...]``: the ranks' parts one after the other along ``dim``."""
    if group.size == 1:
        return x
    moved = x.movedim(dim, 0).contiguous()
    rest = moved.shape[1:]
    numel = math.prod(rest)
    parts = all_gather_flat(moved.flatten(), [length * numel for length in lengths], group)
    whole = torch.cat([part.view(-1, *rest) for part in parts])
    return whole.movedim(0, dim)


def all_to_all(
    sent: torch.Tensor,
    received: torch.Tensor,
    sent_sizes: Sequence[int],
    received_sizes: Sequence[int],
    group: RankGroup,
) -> None:
    """Send consecutive parts of ``sent``, of ``sent_sizes`` numbers, to the ranks; theirs come into ``received``.

    Both are contiguous; ``received`` is written.
    """
    with waiting_for("ranks"):
        dist.all_to_all_single(
            received.view(-1), sent.view(-1), list(received_sizes), list(sent_sizes), group=group.process_group
        )
