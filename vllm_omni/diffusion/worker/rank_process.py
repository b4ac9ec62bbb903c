"""The process of one rank: it joins its groups, loads its part of the model, and carries out the engine's commands.

The engine starts it as ``python -m vllm_omni.diffusion.worker.rank_process DESCRIPTOR`` with one end of a socket.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from vllm_omni.diffusion.distributed.groups import NO_GROUPS, build_groups
from vllm_omni.diffusion.distributed.rank_status import RankStatus, rank_status
from vllm_omni.diffusion.registry import restore_registry_entry
from vllm_omni.diffusion.worker.channel import Channel
from vllm_omni.diffusion.worker.messages import WorkerCommand
from vllm_omni.diffusion.worker.rank_messages import LoadReport, RankBeat, RankReady, RankReply, RankSetup
from vllm_omni.diffusion.worker.worker import Worker
from vllm_omni.errors import first_line

_BEAT_S = 0.25
_BUSY_CPU_S = 0.01  # of a beat, from which a rank counts as computing


class _Heart(threading.Thread):
    """Beats until the engine is gone, and then ends the process, whatever it computes."""

    def __init__(self, channel: Channel, status: RankStatus) -> None:
        super().__init__(name="heart", daemon=True)
        self._channel, self._status = channel, status
        self.is_executing = False
        self._clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)

    def run(self) -> None:
        used, beaten, idle_s = time.clock_gettime(self._clock), time.monotonic(), 0.0
        num_changes = self._status.num_changes
        while True:
            time.sleep(_BEAT_S)
            now_used, now = time.clock_gettime(self._clock), time.monotonic()
            waiting_for = self._status.waiting_for
            num_before, num_changes = num_changes, self._status.num_changes
            if not self.is_executing or now_used - used > _BUSY_CPU_S or num_changes != num_before:
                idle_s = 0.0
            else:
                # While the heart itself did not beat, the whole process or machine stood still: no sign of a hang.
                idle_s += min(now - beaten, 2 * _BEAT_S)
            used, beaten = now_used, now
            beat = RankBeat(idle_s=idle_s, waiting_for=waiting_for, is_alone=self._status.is_alone)
            try:
                self._channel.send(beat)
            except OSError:
                os._exit(1)


def serve(channel: Channel) -> None:
    """Load, then carry out commands until the engine closes the channel."""
    status = RankStatus()
    heart = _Heart(channel, status)
    heart.start()
    setup: RankSetup = channel.receive()
    try:
        worker = _loaded(setup, lambda done, total: channel.send(LoadReport(done=done, total=total)))
    except Exception as error:
        channel.send(RankReady(error=error))
        return
    channel.send(RankReady())
    with rank_status(status):
        while True:
            number, command = channel.receive()
            status.num_changes += 1
            heart.is_executing = True
            reply = _reply(worker, number, command, is_first=setup.rank == 0)
            heart.is_executing = False
            channel.send(reply)
            del command, reply  # pixels, for one: they are memory of the device until the next command is done


def _loaded(setup: RankSetup, on_progress: Any) -> Worker:
    restore_registry_entry(setup.registry_entry)
    config, layout = setup.od_config, setup.layout
    device = config.torch_device
    torch.set_num_threads(setup.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()  # or a device mesh would choose a device by itself
    groups = NO_GROUPS
    if layout.world_size > 1:
        store = dist.TCPStore(setup.store_host, setup.store_port, is_master=False)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=setup.rank, world_size=layout.world_size)
        groups = build_groups(layout, device.type, config.parallel_config.use_hsdp)
    return Worker(config, on_progress if setup.rank == 0 else None, groups)


def _reply(worker: Worker, number: int, command: WorkerCommand, *, is_first: bool) -> RankReply:
    try:
        result = worker.execute(command)
    except Exception as error:
        return RankReply(number=number, result=None, error=error)
    first_error = next(iter(result.errors.values()), None)
    return RankReply(
        number=number,
        result=result if is_first else None,
        finished=frozenset(result.finished),
        failed=frozenset(result.errors),
        error=None if is_first or first_error is None else RuntimeError(first_line(first_error)),
    )


def main() -> None:
    # The engine ends its ranks; an interrupt from the terminal reaches them as well and is the engine's.
    # So is a request to end, which a service manager sends to every process: what runs is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    # Raised where the engine has closed the channel or is gone.
    with contextlib.suppress(EOFError, OSError):
        serve(channel)
    # At once: a group whose other ranks are gone would wait for them.
    os._exit(0)


if __name__ == "__main__":
    main()
