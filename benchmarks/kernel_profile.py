"""Where the time of a forward goes on a GPU, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


def write_profile(path: Path, forward: Callable[[], Any], num_kernels: int = 40) -> None:
    """Milliseconds of each kernel of one forward, those that take longest first; and the time that none ran."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        forward()
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            spans[event.name].append((event.time_range.start / 1000, event.time_range.end / 1000))
    intervals = sorted(span for each in spans.values() for span in each)
    busy, end = 0.0, intervals[0][0]
    for first, last in intervals:
        busy += max(last - max(first, end), 0.0)
        end = max(end, last)
    lines = [f"{end - intervals[0][0]:.2f} ms from first to last kernel, {busy:.2f} ms in {len(intervals)} kernels"]
    totals = sorted(((sum(b - a for a, b in each), len(each), name) for name, each in spans.items()), reverse=True)
    lines += [
        f"{total:9.3f} ms {count:5d} x {1000 * total / count:8.1f} us  {name[:150]}" for total, count, name in totals
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines[: num_kernels + 1]) + "\n")
