"""A server in a process of its own, for benchmarks that must not share its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """The address and the process id of ``vllm-omni serve`` with ``options``, until the block ends."""
    command = [sys.executable, "-m", "vllm_omni", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline()
    if not line.startswith("serving"):
        raise RuntimeError(f"the server did not start: {' '.join(command)}")
    try:
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def cpu_seconds(pid: int | str = "self") -> float:
    """CPU time that a process has used: what it costs, however many others the machine serves meanwhile."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is before ``--`` for a benchmark, and what is after it for its servers."""
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end], argv[end + 1 :]
