"""The groups that this rank belongs to, which layers, loops and loaders ask for: ``current_groups()``.

Models never see a group. What is built or run within :func:`parallel_groups` finds its groups by itself; outside of it
every group is this rank alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vllm_omni import envs
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.distributed.peer_memory import PeerMemory, peer_memory
from vllm_omni.errors import InvalidConfigError


@dataclass(frozen=True)
class RankGroup:
    """This rank's place in a group of ranks that work together in one way."""

    rank: int = 0
    size: int = 1
    process_group: Any = field(default=None, repr=False, compare=False)  # None for a group of one
    # What torch's functional collectives call the group: a string, which compilers need not look into a group for.
    name: str = field(default="", repr=False, compare=False)
    peers: PeerMemory | None = field(default=None, repr=False, compare=False)  # where ranks write to each other

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank} must be at least 0 and less than size={self.size}")


@dataclass(frozen=True)
class TensorParallelRank(RankGroup):
    """Rank ``rank`` of ``size`` ranks that share each linear layer."""

    def divide(self, total: int, what: str) -> int:
        """This rank's part of ``total``. Raises ``InvalidConfigError`` if it does not divide evenly."""
        if total % self.size:
            divisors = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
            raise InvalidConfigError(
                f"{what}={total} does not divide by tensor_parallel_size={self.size}; these would: {divisors}",
                option="tensor_parallel_size",
            )
        return total // self.size

    def shard(self, tensor: torch.Tensor, dim: int, what: str) -> torch.Tensor:
        """This rank's slice of ``tensor`` along ``dim``; a view."""
        length = self.divide(tensor.shape[dim], what)
        return tensor.narrow(dim, self.rank * length, length)


ALONE = RankGroup()
SINGLE_RANK = TensorParallelRank()


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """All groups of this rank. The meshes, for FSDP, are None where there is one rank alone."""

    world: RankGroup = RankGroup()  # all ranks of a replica
    cfg: RankGroup = RankGroup()  # split the rows of a step
    ring: RankGroup = RankGroup()  # pass keys and values around
    ulysses: RankGroup = RankGroup()  # exchange tokens for heads
    sequence: RankGroup = RankGroup()  # split the tokens: ring x ulysses, ulysses fastest
    tp: TensorParallelRank = SINGLE_RANK
    forward: RankGroup = RankGroup()  # compute the same rows: all ranks but those of cfg
    weights: RankGroup = RankGroup()  # hold a part of the weights each, with HSDP
    vae: RankGroup = RankGroup()  # decode tiles
    world_mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    weights_mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)

    @property
    def peers(self) -> list[PeerMemory]:
        """The memories of this rank that others write to."""
        return [group.peers for group in (self.ring, self.ulysses, self.tp) if group.peers is not None]

    @property
    def peer_bytes(self) -> int:
        """Their size."""
        return sum(memory.num_bytes for memory in self.peers)

    def describe(self) -> tuple[str, ...]:
        """Whether some ranks exchange without NCCL, for the receipt."""
        return ("memory of peers",) if self.peers else ()


NO_GROUPS = ParallelGroups()

_current: ContextVar[ParallelGroups] = ContextVar("parallel_groups", default=NO_GROUPS)  # it is frozen


def current_groups() -> ParallelGroups:
    """The groups of this rank."""
    return _current.get()


@contextmanager
def parallel_groups(groups: ParallelGroups) -> Iterator[None]:
    """What is built or run within the block belongs to ``groups``. A worker holds it while it works."""
    token = _current.set(groups)
    try:
        yield
    finally:
        _current.reset(token)


def current_tensor_parallel_rank() -> TensorParallelRank:
    """The rank that layers shard for unless they are told another."""
    return _current.get().tp


@contextmanager
def tensor_parallel_rank(rank: TensorParallelRank) -> Iterator[None]:
    """Layers that are built within the block shard for ``rank``."""
    with parallel_groups(replace(_current.get(), tp=rank)):
        yield


def build_groups(layout: ParallelLayout, device_type: str, use_hsdp: bool = False) -> ParallelGroups:
    """The groups of this rank in ``layout``. ``torch.distributed`` must run with as many ranks.

    All ranks call it in the same order: making a group is a collective.
    """
    if layout.world_size == 1:
        return ParallelGroups()
    mesh = init_device_mesh(device_type, layout.mesh_shape, mesh_dim_names=layout.MESH_DIMS)
    sequence = mesh["ring", "ulysses"]._flatten("sequence")
    # The dimensions of size 1 belong to no other group, so that flattening over them adds none.
    forward = mesh["hsdp", "ring", "ulysses", "tp"]._flatten("forward")
    world = mesh._flatten("world")
    weights = mesh["hsdp", "ring", "ulysses"]._flatten("weights")
    # Two ranks sum best by reading each other's numbers; more would read more than NCCL sends.
    tp = _group(mesh["tp"]) if mesh["tp"].size() != 2 else _with_peers(_group(mesh["tp"]), device_type)
    vae_size = layout.vae
    # Ranks that decode are the first of the world.
    vae_group = dist.new_group(list(range(vae_size))) if vae_size > 1 else None
    rank = dist.get_rank()
    vae = RankGroup(rank, vae_size, vae_group) if vae_group is not None and rank < vae_size else RankGroup()
    return ParallelGroups(
        world=_group(world),
        cfg=_group(mesh["cfg"]),
        ring=_with_peers(_group(mesh["ring"]), device_type),
        ulysses=_with_peers(_group(mesh["ulysses"]), device_type),
        sequence=_group(sequence),
        tp=TensorParallelRank(tp.rank, tp.size, tp.process_group, tp.name, tp.peers),
        forward=_group(forward),
        weights=_group(weights) if use_hsdp else ALONE,
        vae=vae,
        world_mesh=world,
        weights_mesh=weights,
    )


def _group(mesh: DeviceMesh) -> RankGroup:
    if mesh.size() == 1:
        return ALONE
    group = mesh.get_group()
    return RankGroup(mesh.get_local_rank(), mesh.size(), group, str(group.group_name))


def _with_peers(group: RankGroup, device_type: str) -> RankGroup:
    """The group with the memory that its ranks share, if they may and can. All of its ranks call it."""
    if group.size == 1 or device_type != "cuda" or not envs.uses_peer_memory():
        return group
    return replace(group, peers=peer_memory(torch.device("cuda", torch.cuda.current_device()), group.process_group))
