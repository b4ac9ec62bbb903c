"""A pool of ranks that is started once and runs functions of test modules on all of them.

Importing torch takes seconds, and a layout needs no processes of its own: its groups are made in the pool.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 120


class RankPool:
    """``size`` processes with a gloo group over all of them. A function that fails on one rank ends the pool."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, self._store.port), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on each rank. ``function`` is one of a module's, as are its arguments."""
        for connection in self._connections:
            connection.send((function, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(_TIMEOUT_S):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} gave no answer in {_TIMEOUT_S} s")
            answers.append(connection.recv())
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (None, function(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        connection.send(answer)
