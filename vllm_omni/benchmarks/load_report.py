"""What a load tells: throughput, latencies, how many kept their time, errors; as numbers and as a plot."""

from __future__ import annotations

import collections
import html
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_omni.benchmarks.load import RequestGroup, RequestSample

_COLOURS = ("#4f46e5", "#d97706", "#059669", "#dc2626", "#0891b2", "#9333ea")


def summarize(
    samples: Sequence[RequestSample], groups: Sequence[RequestGroup], percentiles: Sequence[float]
) -> dict[str, Any]:
    """The figures of all requests, and under ``groups`` those of each group.

    The duration runs from the first arrival to the last end. SLO attainment is the share of the requests that have an
    objective and were done in time; one that failed was not. Goodput is how many of them were done in time per second.
    """
    duration_s = max(sample.finished_s for sample in samples) - min(sample.arrival_s for sample in samples)
    objectives = {group.name: group.slo_s for group in groups}
    return {
        "duration_s": duration_s,
        "max_in_flight": _max_in_flight(samples),
        **_figures(samples, objectives, duration_s, percentiles),
        "groups": {
            group.name: _figures([s for s in samples if s.group == group.name], objectives, duration_s, percentiles)
            for group in groups
        },
    }


def _figures(
    samples: Sequence[RequestSample],
    objectives: dict[str, float | None],
    duration_s: float,
    percentiles: Sequence[float],
) -> dict[str, Any]:
    done = [sample for sample in samples if sample.error is None]
    latencies = [sample.latency_s for sample in done]
    timed = [(sample, slo_s) for sample in samples if (slo_s := objectives[sample.group]) is not None]
    num_in_time = sum(sample.error is None and sample.latency_s <= slo_s for sample, slo_s in timed)
    outputs = sum(sample.num_outputs for sample in done)
    return {
        "num_requests": len(samples),
        "num_completed": len(done),
        "num_outputs": outputs,
        "requests_per_s": len(done) / duration_s,
        "outputs_per_s": outputs / duration_s,
        "mean_latency_s": float(np.mean(latencies)) if latencies else None,
        "latency_s": {f"p{p:g}": float(np.percentile(latencies, p)) if latencies else None for p in percentiles},
        "slo_attainment": num_in_time / len(timed) if timed else None,
        "goodput_per_s": num_in_time / duration_s if timed else None,
        "errors": dict(collections.Counter(sample.error for sample in samples if sample.error is not None)),
    }


def _max_in_flight(samples: Sequence[RequestSample]) -> int:
    changes = sorted([(s.sent_s, 1) for s in samples] + [(s.finished_s, -1) for s in samples])
    return max(itertools.accumulate(change for _, change in changes))


def table(summary: dict[str, Any]) -> str:
    """The figures as lines of text, a column per group and one for all."""
    columns = {"all": summary} | (summary["groups"] if len(summary["groups"]) > 1 else {})
    first = next(iter(columns.values()))
    rows: list[tuple[str, list[str]]] = [
        ("", list(columns)),
        ("requests", [str(c["num_requests"]) for c in columns.values()]),
        ("completed", [str(c["num_completed"]) for c in columns.values()]),
        ("requests/s", [_number(c["requests_per_s"]) for c in columns.values()]),
        ("outputs/s", [_number(c["outputs_per_s"]) for c in columns.values()]),
        ("mean latency s", [_number(c["mean_latency_s"]) for c in columns.values()]),
    ]
    rows += [
        (f"{name} latency s", [_number(c["latency_s"][name]) for c in columns.values()]) for name in first["latency_s"]
    ]
    if first["slo_attainment"] is not None:
        rows.append(("SLO attainment %", [_number(c["slo_attainment"], 100) for c in columns.values()]))
        rows.append(("goodput/s", [_number(c["goodput_per_s"]) for c in columns.values()]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(columns))]
    lines = [
        f"{name:<18}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    lines += [f"errors: {count} x {kind}" for kind, count in summary["errors"].items()]
    return "\n".join(lines)


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.3g}" if value * factor < 1000 else f"{value * factor:.0f}"


def plot_svg(samples: Sequence[RequestSample], groups: Sequence[RequestGroup], title: str) -> str:
    """Two charts: the share of requests that were done within a latency, and each request's latency by its arrival.

    Failed requests are crosses in the second one.
    """
    done = [sample for sample in samples if sample.error is None]
    longest = _round_up(max(sample.latency_s for sample in samples))
    last = _round_up(max(sample.arrival_s for sample in samples))
    left = _Axes(60, longest, 100.0, "latency, s", "requests done, %")
    right = _Axes(520, last, longest, "arrival, s", "latency, s")
    parts = [left.frame(), right.frame()]
    for group, colour in zip(groups, itertools.cycle(_COLOURS), strict=False):
        ordered = sorted(sample.latency_s for sample in done if sample.group == group.name)
        if ordered:
            steps = [(value, 100 * (i + up) / len(ordered)) for i, value in enumerate(ordered) for up in (0, 1)]
            parts.append(left.line([(0, 0), *steps, (longest, 100)], colour))
        if group.slo_s is not None and group.slo_s <= longest:
            parts.append(left.line([(group.slo_s, 0), (group.slo_s, 100)], colour, dashed=True))
        parts += [
            right.mark(sample.arrival_s, sample.latency_s, colour, is_cross=sample.error is not None)
            for sample in samples
            if sample.group == group.name
        ]
    for i, (group, colour) in enumerate(zip(groups, itertools.cycle(_COLOURS), strict=False)):
        objective = "" if group.slo_s is None else f", dashed: within {group.slo_s:g} s"
        parts.append(_text(60, 372 + 18 * i, f"● {group.name}{objective}", fill=colour))
    height = 380 + 18 * len(groups)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" font-family="sans-serif" font-size="13">'
        f'<rect width="960" height="{height}" fill="#fff"/>{_text(60, 24, title, size=15)}{"".join(parts)}</svg>\n'
    )


class _Axes:
    """A chart of 380 x 260 pixels, 50 below the top; its left edge is at ``x``."""

    def __init__(self, x: float, x_max: float, y_max: float, x_label: str, y_label: str) -> None:
        self._x, self._x_max, self._y_max = x, x_max, y_max
        self._labels = (x_label, y_label)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return round(self._x + 380 * x / self._x_max, 1), round(310 - 260 * y / self._y_max, 1)

    def frame(self) -> str:
        x, (x_label, y_label) = self._x, self._labels
        parts = [f'<path d="M{x} 50V310H{x + 380}" fill="none" stroke="#888"/>']
        for i in range(5):
            x_at, y_at = x + 95 * i, 310 - 65 * i
            parts.append(_text(x_at, 328, f"{self._x_max * i / 4:.3g}", anchor="middle"))
            parts.append(_text(x - 6, y_at + 4, f"{self._y_max * i / 4:.3g}", anchor="end"))
            parts.append(f'<path d="M{x} {y_at}h380" stroke="#ddd"/>')
        return "".join([*parts, _text(x + 190, 346, x_label, anchor="middle"), _text(x, 42, y_label)])

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> str:
        path = " ".join(f"{x},{y}" for x, y in (self._at(*point) for point in points))
        dashes = ' stroke-dasharray="4"' if dashed else ""
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'

    def mark(self, x: float, y: float, colour: str, is_cross: bool) -> str:
        x, y = self._at(x, y)
        if is_cross:
            return f'<path d="M{x - 4} {y - 4}l8 8m0-8l-8 8" stroke="{colour}"/>'
        return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}" fill-opacity="0.6"/>'


def _round_up(value: float) -> float:
    """To a number whose quarters are short to read."""
    size = 10 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(size * step for step in (1, 2, 4, 6, 8, 10) if size * step >= value)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, fill: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{html.escape(text)}</text>'
