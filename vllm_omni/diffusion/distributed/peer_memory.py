"""Memory of a rank that the other ranks of its machine read and write, over NVLink or PCIe and without NCCL.

NCCL moves what was packed for it. Where a rank can address the memory of another, it writes each tensor to where it
belongs there, and adds to its own numbers what it reads there. Memory is that of
``torch.distributed._symmetric_memory``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from vllm_omni.diffusion.distributed.rank_status import waiting_for
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_SMALLEST = 1 << 20  # bytes
_NUM_PROBES = 8

# What stands for the sequence of exchanges in progress, if they are known to follow each other.
_sequence: ContextVar[object | None] = ContextVar("exchange_sequence", default=None)
# By what torch calls the group: an operator of compiled code gets a name.
_by_group: dict[str, PeerMemory] = {}


@contextmanager
def exchange_sequence() -> Iterator[None]:
    """What ranks exchange within the block always follows each other as it does here, as in a CUDA graph.

    Within another one it is a part of that.
    """
    token = _sequence.set(_sequence.get() or object())
    try:
        yield
    finally:
        _sequence.reset(token)


def memory_of(group_name: str) -> PeerMemory:
    """The memory that the ranks of a group share, by the name of the group. There must be some."""
    return _by_group[group_name]


class PeerBuffer:
    """As many bytes on each rank of a group, which all of them may write to."""

    def __init__(self, num_bytes: int, device: torch.device, process_group: Any) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        self.num_bytes = num_bytes
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, process_group)

    def on(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The begin of the buffer of ``rank`` as a tensor."""
        tensor: torch.Tensor = self._handle.get_buffer(rank, list(shape), dtype)
        return tensor

    def barrier(self) -> None:
        """What every rank has written before, every rank reads after it. Only the device waits."""
        self._handle.barrier(channel=0)


class PeerMemory:
    """Buffers of a group by what they are for; each grows as it is asked to. All ranks ask alike."""

    def __init__(self, device: torch.device, process_group: Any) -> None:
        self._device, self._process_group = device, process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        # Those that were outgrown stay: CUDA graphs write to them.
        self._buffers: dict[str, list[PeerBuffer]] = {}
        self._turns: dict[str, tuple[object | None, int]] = {}  # the sequence and the buffer of the last turn
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        _by_group[str(process_group.group_name)] = self

    @property
    def num_bytes(self) -> int:
        """Of all buffers on this rank. They do not lie in what torch's allocator hands out and counts."""
        return sum(buffer.num_bytes for buffers in self._buffers.values() for buffer in buffers)

    def buffer(self, name: str, num_bytes: int) -> PeerBuffer:
        """One of at least ``num_bytes``. While a CUDA graph is captured, it must exist."""
        buffers = self._buffers.setdefault(name, [])
        for buffer in buffers:
            if buffer.num_bytes >= num_bytes:
                return buffer
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        with waiting_for("ranks"):
            buffers.append(self._new_buffer(f"{name}-{size}", size))
        return buffers[-1]

    def turn(self, name: str, num_bytes: int) -> PeerBuffer:
        """A buffer to write to for an exchange of this kind, which has one barrier between writing and reading.

        Two take turns: this rank writes what is exchanged two turns later only after the barrier of the turn between,
        which the others reached after they had read this one. That holds for turns that follow each other within
        :func:`exchange_sequence`. What came before others is not known, for graphs are replayed in any order: those
        begin with a barrier. A sequence always begins with the same buffer, so that a rank that replays it and one that
        runs it use the same ones.
        """
        pair = [self.buffer(f"{name}-{index}", num_bytes) for index in (0, 1)]
        sequence, (last_sequence, last) = _sequence.get(), self._turns.get(name, (None, 0))
        follows = sequence is not None and sequence is last_sequence
        index = 1 - last if follows else 0
        self._turns[name] = (sequence, index)
        if not follows:
            pair[index].barrier()
        return pair[index]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The block works on a stream of its own, beside what follows it until :meth:`join`. It allocates nothing."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """Wait for what was done beside. What it read must live until here."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _new_buffer(self, name: str, num_bytes: int) -> PeerBuffer:
        return PeerBuffer(num_bytes, self._device, self._process_group)


def peer_memory(device: torch.device, process_group: Any) -> PeerMemory | None:
    """Memory that the ranks of a group share, or None where they cannot. All ranks of the group call it.

    They can on one machine, between GPUs that address each other, if what each of them writes arrives.
    """
    # Multicast of NVLink switches is not used, and to set it up needs rights that not every machine gives.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if not _agree(_reaches_peers(device, process_group), device, process_group):
        return None
    memory = None
    try:
        memory = PeerMemory(device, process_group)
        memory.buffer("probe", _SMALLEST)
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.info("ranks exchange by NCCL alone: %s", error)
    if not _agree(memory is not None, device, process_group):
        return None
    assert memory is not None
    if not _agree(carries(memory, process_group), device, process_group):
        logger.warning("ranks exchange by NCCL alone: what they wrote to each other's memory did not arrive")
        return None
    return memory


def carries(memory: PeerMemory, process_group: Any) -> bool:
    """Whether this rank finds in its memory, several times over, what each rank of the group wrote there."""
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    buffer = memory.buffer("probe", _SMALLEST)
    shape = (size, _SMALLEST // 4 // size)
    arrived = []
    for turn in range(_NUM_PROBES):
        for other in range(size):
            buffer.on(other, shape, torch.int32)[rank].fill_(turn * size + rank)
        buffer.barrier()
        numbers = buffer.on(rank, shape, torch.int32)
        arrived.append((numbers == torch.arange(turn * size, (turn + 1) * size, device=numbers.device)[:, None]).all())
        buffer.barrier()  # nobody writes anew before all have read
    return bool(torch.stack(arrived).all().item())


def _reaches_peers(device: torch.device, process_group: Any) -> bool:
    """Whether all ranks are on this machine and each sees and can address the others' GPUs."""
    places: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=process_group)
    own = places[dist.get_rank(process_group)]
    others = [place for place in places if place != own]
    return len(others) == len(places) - 1 and all(
        host == own[0] and index < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device.index, index)
        for host, index in others
    )


def _agree(value: bool, device: torch.device, process_group: Any) -> bool:
    """Whether it is true on all ranks."""
    agreed = torch.tensor([int(value)], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=process_group)
    return bool(agreed.item())
