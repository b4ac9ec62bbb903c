"""The processes of the ranks of one replica: started, heard, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.layout import ParallelLayout, rank_config_device
from vllm_omni.diffusion.distributed.rank_status import Wait
from vllm_omni.diffusion.registry import registry_entry
from vllm_omni.diffusion.worker.channel import Channel, Message
from vllm_omni.diffusion.worker.rank_messages import RankBeat, RankSetup
from vllm_omni.errors import RankFailureError

ENDED = "ended by itself"
_CLOSING_S = 3.0  # that ranks have to end by themselves
SEND_TIMEOUT_S = 8.0
# Without a sign of life of a rank that starts: until the first, and from one to the next.
_SILENT_START_S = 120.0
_SILENT_LOAD_S = 30.0
# For which a rank that others wait for waits for nothing and yet computes nothing. To be sure, longer where it may be
# that it waits for another, and where it is silent: a kernel that is loaded stops all threads, and may have to wait for
# a device that waits for a rank that hangs.
_STALL_S = 6.0
_UNSURE_STALL_S = 7.2
_SILENCE_S = 6.5
# In which compilers, which are processes of their own, have done their work, and ranks have found each other.
_LONG_STALL_S = 60.0


class RankHandle(Protocol):
    """The process of a rank, wherever it runs."""

    pid: int

    def why_gone(self) -> str | None:
        """How the process ended, ``ENDED`` if by itself; None while it lives."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, no longer than this."""

    def kill(self) -> None:
        """End it now."""


@dataclass(kw_only=True)
class Rank:
    """One process, and what was last heard of it."""

    number: int
    handle: RankHandle
    channel: Channel
    beat: RankBeat = field(default_factory=lambda: RankBeat(idle_s=0.0, waiting_for=None))
    beat_time: float = field(default_factory=time.monotonic)
    has_beaten: bool = False


class RankPool:
    """One process per rank on this machine. ``first_device`` counts devices from the configured one."""

    def __init__(self, od_config: OmniDiffusionConfig, layout: ParallelLayout, first_device: int = 0) -> None:
        host = self._host()
        # No port is chosen here: the kernel gives one that is free, and takes it back with the store.
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        num_threads = max(1, torch.get_num_threads() // layout.num_ranks)
        self._selector = selectors.DefaultSelector()
        self.ranks: list[Rank] = []
        self._first, self._total = first_device, layout.num_ranks  # as errors count, over all replicas
        handles: list[RankHandle] = []
        # Whatever happens to this object, and at the latest when the interpreter ends.
        self._finalizer = weakref.finalize(self, _kill, handles)
        for rank in self._start(layout.world_size, od_config.torch_device, handles):
            self.ranks.append(rank)
            self._selector.register(rank.channel, selectors.EVENT_READ, rank)
            setup = RankSetup(
                od_config=replace(od_config, device=self._device(od_config.torch_device, first_device + rank.number)),
                rank=rank.number,
                layout=layout,
                store_host=host,
                store_port=self._store.port,
                num_threads=num_threads,
                registry_entry=registry_entry(od_config.model_class_name),
            )
            rank.channel.send(setup)

    def _host(self) -> str:
        """The address at which the ranks reach this process."""
        return "127.0.0.1"

    def _device(self, device: torch.device, number: int) -> str:
        return rank_config_device(device, number)

    def _start(self, num_ranks: int, device: torch.device, handles: list[RankHandle]) -> Iterator[Rank]:
        """The ranks in their order. Whatever has been started is in ``handles``, also after an error."""
        for number in range(num_ranks):
            ours, theirs = socket.socketpair()
            ours.settimeout(SEND_TIMEOUT_S)
            handle = _LocalProcess(theirs)
            handles.append(handle)
            yield Rank(number=number, handle=handle, channel=Channel(ours))

    def broadcast(self, value: Any) -> None:
        """Send ``value`` to every rank. Raises ``RankFailureError`` for one that does not take it."""
        message = Message(value)
        try:
            for rank in self.ranks:
                try:
                    rank.channel.send_message(message)
                except OSError:
                    raise self.failure(
                        rank, rank.handle.why_gone() or f"took no command for {SEND_TIMEOUT_S:g} s"
                    ) from None
        finally:
            message.close()

    def receive(self, timeout_s: float, hear: Callable[[Rank, Any], None]) -> None:
        """Hear what ranks say within ``timeout_s``. Raises ``RankFailureError`` for one that is gone."""
        for key, _ in self._selector.select(timeout_s):
            rank: Rank = key.data
            try:
                value = rank.channel.receive()
            except (EOFError, OSError):
                rank.handle.wait(1.0)
                raise self.failure(rank, rank.handle.why_gone() or "closed its channel") from None
            rank.beat_time = time.monotonic()
            if isinstance(value, RankBeat):
                rank.beat, rank.has_beaten = value, True
            else:
                hear(rank, value)

    def check_starts(self, ready: set[int]) -> None:
        """Raises ``RankFailureError`` for a rank that starts, is not yet ``ready`` and is not heard of."""
        for rank in self.ranks:
            limit = _SILENT_LOAD_S if rank.has_beaten else _SILENT_START_S
            if rank.number not in ready and time.monotonic() - rank.beat_time > limit:
                raise self.failure(rank, f"has given no sign of life for {limit:g} s while it started")

    def check_stalls(self, late: Sequence[Rank], began: float) -> None:
        """Raises ``RankFailureError`` for a rank that hangs, if one of those ``late`` does.

        ``began``: since when their replies are waited for, in seconds of ``time.monotonic()``.
        """
        heard = [rank for rank in late if rank.beat_time >= began]  # others told of the command before
        waits = {rank.beat.waiting_for for rank in heard}
        others_wait = len(heard) < len(self.ranks) or not waits.isdisjoint({"ranks", "device", "compiled"})
        patience_s: dict[Wait | None, float] = {
            None: _STALL_S if others_wait else _UNSURE_STALL_S,
            "compiler": _LONG_STALL_S,
        }
        if len(heard) == len(late) and all(
            rank.beat.waiting_for != "device" and rank.beat.idle_s > _STALL_S for rank in late
        ):
            # Nobody computes for whom the others could wait.
            patience_s |= {"compiled": _UNSURE_STALL_S, "ranks": _LONG_STALL_S}
        for rank in sorted(heard, key=lambda rank: -rank.beat.idle_s):
            if rank.beat.idle_s > patience_s.get(rank.beat.waiting_for, float("inf")):
                raise self.failure(rank, f"hangs: it has done nothing for {rank.beat.idle_s:.0f} s")
        for rank in late:
            silent_s = time.monotonic() - max(rank.beat_time, began)
            compiles = rank in heard and rank.beat.waiting_for == "compiler"
            if silent_s > (_LONG_STALL_S if compiles else _SILENCE_S):
                raise self.failure(rank, f"has given no sign of life for {silent_s:.0f} s")

    def death(self) -> RankFailureError | None:
        """The error for a rank whose process has ended; None if all live."""
        gone = [(rank, why) for rank in self.ranks if (why := rank.handle.why_gone()) is not None]
        # Those that ended by themselves may have followed.
        rank, why = min(gone, key=lambda each: each[1] == ENDED, default=(None, ENDED))
        return None if rank is None else self.own_failure(rank, why)

    def failure(self, rank: Rank, cause: str, detail: str | None = None) -> RankFailureError:
        """The error for ``rank``; for another one, if that was killed: then what ``rank`` says only follows from it."""
        death = self.death()
        if death is None or death.summary.endswith(ENDED):
            return self.own_failure(rank, cause, detail)
        return death

    def own_failure(self, rank: Rank, cause: str, detail: str | None = None) -> RankFailureError:
        """The error for ``rank``, whatever became of the others."""
        number = self._first + rank.number
        return RankFailureError(f"rank {number} of {self._total} {cause}", rank=number, detail=detail)

    def close(self, *, gently: bool = True) -> None:
        """End all processes. With ``gently``, they may finish what they do, for a few seconds."""
        for rank in self.ranks:
            self._selector.unregister(rank.channel)
            rank.channel.close()
        if gently:
            deadline = time.monotonic() + _CLOSING_S
            for rank in self.ranks:
                rank.handle.wait(max(0.0, deadline - time.monotonic()))
        self._finalizer()
        self._selector.close()
        del self._store


class _LocalProcess:
    """A child of this process, with one end of a socket."""

    def __init__(self, end: socket.socket) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_omni.diffusion.worker.rank_process", str(end.fileno())],
            pass_fds=(end.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        end.close()
        self.pid = self._process.pid

    def why_gone(self) -> str | None:
        code = self._process.poll()
        if not code:
            return None if code is None else ENDED
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()


def _kill(handles: list[RankHandle]) -> None:
    for handle in handles:
        handle.kill()
    for handle in handles:
        handle.wait(_CLOSING_S)
