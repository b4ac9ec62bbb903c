"""Where the time of a forward goes on a GPU, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

# Milliseconds from begin to end of each run of each kernel, by name.
Spans = dict[str, list[tuple[float, float]]]

# In the names of kernels by which ranks exchange: NCCL's and, with each other's memory, waits and copies to it. Sums
# that read it are additions by name, and count as computing.
_OF_RANKS = ("nccl", "symmetric_memory::barrier", "_copy_in_turn", "memcpy ptop")


def kernel_spans(run: Callable[[], Any]) -> Spans:
    """What the current GPU does during ``run()``."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans: Spans = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith("nccl:"):  # a range of the host
            spans[event.name].append((event.time_range.start / 1000, event.time_range.end / 1000))
    return spans


def profile_lines(spans: Spans, num_kernels: int = 40) -> list[str]:
    """Milliseconds of each kernel, those that take longest first; and the time that none ran."""
    intervals = [span for each in spans.values() for span in each]
    whole = max(end for _, end in intervals) - min(start for start, _ in intervals)
    lines = [f"{whole:.2f} ms from first to last kernel, {_covered(intervals):.2f} ms in {len(intervals)} kernels"]
    totals = sorted(((sum(b - a for a, b in each), len(each), name) for name, each in spans.items()), reverse=True)
    lines += [
        f"{total:9.3f} ms {count:5d} x {1000 * total / count:8.1f} us  {name[:150]}" for total, count, name in totals
    ]
    return lines[: num_kernels + 1]


def write_profile(path: Path, forward: Callable[[], Any]) -> None:
    """Write the profile of one forward."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(profile_lines(kernel_spans(forward))) + "\n")


def overlap(spans: Spans) -> dict[str, float]:
    """Milliseconds of kernels that compute and of those that communicate (which includes waiting for other ranks).

    ``exposed_ms`` is the time in which only the latter ran, ``idle_ms`` that in which none did.
    """
    talk, compute = list[tuple[float, float]](), list[tuple[float, float]]()
    for name, each in spans.items():
        (talk if any(part in name.lower() for part in _OF_RANKS) else compute).extend(each)
    everything = [*talk, *compute]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    computing, busy = _covered(compute), _covered(everything)
    values = {
        "whole_ms": whole,
        "computing_ms": computing,
        "communicating_ms": _covered(talk),
        "exposed_ms": busy - computing,
        "idle_ms": whole - busy,
    }
    return {name: round(value, 2) for name, value in values.items()}


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total
