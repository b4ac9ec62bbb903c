"""Draw the plots of docs/performance.md from benchmarks/results/: forwards of full-size transformers, and pictures.

    python -m benchmarks.plots

Where the modulations of a request's steps are prepared at once, a forward's share of that counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = {"flux": 28, "qwen-image": 50}  # of a request
TITLES = {"flux": "FLUX.1-dev", "qwen-image": "Qwen-Image", "wan": "Wan 2.2 A14B, 480p, 81 frames"}
MASKED = "fp8 with attention, balanced mask"
LABELS = {
    MASKED: "the same, balanced step mask",
    "fp8 with attention": "vllm-omni, FP8, attention too",
    "fp8": "vllm-omni, FP8",
    "compiled": "vllm-omni, bf16",
    "diffusers": "diffusers, compiled, bf16",
}
COLOURS = {
    MASKED: "#08402b",
    "fp8 with attention": "#0f5c41",
    "fp8": "#1b7f5c",
    "compiled": "#4fb08d",
    "diffusers": "#9aa4ae",
}
WIDTH, LEFT, BAR, GAP = 790, 220, 20, 34


def forward_bars(results: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each bar; diffusers on the best of its attention backends."""
    ours = results["vllm-omni"]
    peers = [figures["ms"] for name, figures in results["diffusers"].items() if "compiled" in name and "ms" in figures]
    named = {mode: _forward_ms(ours, mode, STEPS.get(results["model"])) for mode in LABELS if mode in ours}
    return named | {"diffusers": min(peers)}


def _forward_ms(ours: dict[str, Any], mode: str, num_steps: int | None) -> float:
    prepared = ours.get(f"{mode}, modulations prepared")
    return float(ours[mode]["ms"] if prepared is None else prepared[f"ms_with_share_of_{num_steps}_steps"])


def picture_bars(results: dict[str, Any]) -> dict[str, float]:
    """Seconds of each bar."""
    return {case: results[case]["batch 1"]["seconds"] for case in LABELS if case in results}


def svg(groups: dict[str, dict[str, float]], unit: str, digits: int, caption: str) -> str:
    """Bars of each title's cases. Ratios are to diffusers."""
    lines, y = [], 10
    for title, values in groups.items():
        longest = max(values.values())
        y += GAP
        lines.append(f'<text x="10" y="{y - 8}" font-weight="bold">{title}</text>')
        for name, value in values.items():
            length = (WIDTH - LEFT - 130) * value / longest
            lines.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{LABELS[name]}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="{BAR}" fill="{COLOURS[name]}"/>')
            ratio = "" if name == "diffusers" else f" ({value / values['diffusers']:.2f})"
            lines.append(f'<text x="{LEFT + length + 6:.0f}" y="{y + 14}">{value:.{digits}f} {unit}{ratio}</text>')
            y += BAR + 5
    y += 24
    lines.append(f'<text x="10" y="{y}" fill="#555">{caption}</text>')
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif"'
        f' font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def read(name: str) -> dict[str, Any]:
    """The results of a benchmark."""
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return results


def main() -> None:
    forwards = {TITLES[name]: read(f"{name.replace('-', '_')}_step") for name in TITLES}
    pictures = {
        f"{TITLES[name]}, {steps} steps": read(f"{name.replace('-', '_')}_generate") for name, steps in STEPS.items()
    }
    hardware = next(iter(forwards.values()))["environment"]["hardware"]
    for file, bars, given, unit, digits, caption in (
        ("performance.svg", forward_bars, forwards, "ms", 1, "One forward of the transformer, batch 1"),
        ("performance_pictures.svg", picture_bars, pictures, "s", 2, "From prompt embeddings to a 1024 x 1024 picture"),
    ):
        groups = {title: bars(results) for title, results in given.items()}
        (ROOT / "docs" / file).write_text(svg(groups, unit, digits, f"{caption}, random weights; {hardware}"))


if __name__ == "__main__":
    main()
