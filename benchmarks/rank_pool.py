"""A pool of ranks that is started once and runs functions of modules on all of them: for measurements and tests.

Importing torch takes seconds, and a layout needs no processes of its own: its groups are made in the pool. A pool that
hangs says where each rank stands.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START_S = 120.0
_DUMP_S = 1.0  # that a rank has to write where it stands


class RankPool:
    """``size`` processes with a group over all of them.

    ``device_type="cuda"`` gives each rank the GPU of its number. They start while other things go on, and import the
    modules of ``preload`` as well. A function that fails or hangs on one rank ends the pool.
    """

    def __init__(
        self, size: int, device_type: str = "cpu", *, timeout_s: float = 120, preload: Sequence[str] = ()
    ) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._is_ready = False
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._dumps = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, device_type, self._store.port, str(self._dump_file(rank)), tuple(preload))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """What ``function(*args)`` returns on each rank. ``function`` is one of a module's, as are its arguments.

        Raises ``AssertionError`` with what the ranks raised, or with the line at which each of them stands.
        """
        if not self._is_ready:
            self._is_ready = True
            self.run(_started, timeout_s=_START_S)
        for connection in self._connections:
            connection.send((function, args))
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        answers: dict[int, tuple[str | None, Any]] = {}
        while len(answers) < self.size:
            for rank, connection in enumerate(self._connections):
                if rank not in answers and connection.poll(0.02):
                    with contextlib.suppress(EOFError):
                        answers[rank] = connection.recv()
                        continue
                    answers[rank] = (f"ended with code {self._processes[rank].exitcode}", None)
            failed = [f"rank {rank}: {error}" for rank, (error, _) in sorted(answers.items()) if error]
            if failed and (time.monotonic() > deadline or len(answers) == self.size or not self._wait(answers)):
                where = self.where()
                self.close()
                raise AssertionError("\n".join([*failed, *([where] if len(answers) < self.size else [])]))
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self.size) if rank not in answers]
                where = self.where()
                self.close()
                raise AssertionError(f"ranks {missing} of {self.size} gave no answer in time\n{where}")
        return [answers[rank][1] for rank in range(self.size)]

    def where(self) -> str:
        """The stack of every rank as it is now."""
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(_DUMP_S)
        return "\n".join(f"rank {rank} stands at\n{_text_of(self._dump_file(rank))}" for rank in range(self.size))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._dumps.cleanup()

    def _dump_file(self, rank: int) -> Path:
        return Path(self._dumps.name) / f"rank{rank}.txt"

    def _wait(self, answers: dict[int, Any]) -> bool:
        """Whether the ranks without an answer, which may wait for one that failed, answer within moments."""
        missing = [self._connections[rank] for rank in range(self.size) if rank not in answers]
        return all(connection.poll(2.0) for connection in missing)


def _serve(
    connection: Connection, rank: int, size: int, device_type: str, port: int, dump_file: str, preload: Sequence[str]
) -> None:
    faulthandler.register(signal.SIGUSR1, Path(dump_file).open("w"))  # noqa: SIM115 - for as long as the process lives
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    for module in preload:
        importlib.import_module(module)
    _join(rank, size, device_type, port)
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


def _join(rank: int, size: int, device_type: str, port: int) -> None:
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        torch.cuda.init()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def _end_with_parent() -> None:
    """Also where it is killed, and whatever this process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the pool starts its ranks"
    parent.join()
    os._exit(1)


def _started() -> None:
    """What ranks run first, so that the time of their start is not that of a function."""


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else "the start of its process"
