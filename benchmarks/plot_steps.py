"""Draw docs/performance.svg: one forward of each full-size transformer, from benchmarks/results/*_step.json.

    python -m benchmarks.plot_steps

Where the modulations of a request's steps are prepared at once, a forward's share of that counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"flux": 28, "qwen-image": 50}  # of a request
TITLES = {"flux": "FLUX.1-dev", "qwen-image": "Qwen-Image", "wan": "Wan 2.2 A14B, 480p, 81 frames"}
LABELS = {
    "fp8 with attention": "vllm-omni, FP8, attention too",
    "fp8": "vllm-omni, FP8",
    "compiled": "vllm-omni, bf16",
    "diffusers": "diffusers, compiled, bf16",
}
COLOURS = {"fp8 with attention": "#0f5c41", "fp8": "#1b7f5c", "compiled": "#4fb08d", "diffusers": "#9aa4ae"}
WIDTH, LEFT, BAR, GAP = 780, 210, 20, 34


def bars(results: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each bar; diffusers on the best of its attention backends."""
    ours = results["vllm-omni"]
    peers = [figures["ms"] for name, figures in results["diffusers"].items() if "compiled" in name and "ms" in figures]
    named = {mode: milliseconds(ours, mode, STEPS.get(results["model"])) for mode in LABELS if mode in ours}
    return named | {"diffusers": min(peers)}


def milliseconds(ours: dict[str, Any], mode: str, num_steps: int | None) -> float:
    prepared = ours.get(f"{mode}, modulations prepared")
    return float(ours[mode]["ms"] if prepared is None else prepared[f"ms_with_share_of_{num_steps}_steps"])


def svg(files: list[Path]) -> str:
    lines, y = [], 10
    for path in files:
        results = json.loads(path.read_text())
        values = bars(results)
        longest = max(values.values())
        title = TITLES[results["model"]] + (f", {results['layers']} layers" if results["layers"] else "")
        y += GAP
        lines.append(f'<text x="10" y="{y - 8}" font-weight="bold">{title}</text>')
        for name, ms in values.items():
            length = (WIDTH - LEFT - 130) * ms / longest
            lines.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{LABELS[name]}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="{BAR}" fill="{COLOURS[name]}"/>')
            ratio = "" if name == "diffusers" else f" ({ms / values['diffusers']:.2f})"
            lines.append(f'<text x="{LEFT + length + 6:.0f}" y="{y + 14}">{ms:.1f} ms{ratio}</text>')
            y += BAR + 5
    hardware = json.loads(files[0].read_text())["environment"]["hardware"]
    y += 24
    lines.append(
        f'<text x="10" y="{y}" fill="#555">One forward of the transformer, batch 1, random weights; {hardware}</text>'
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif"'
        f' font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    files = [ROOT / "benchmarks" / "results" / f"{name.replace('-', '_')}_step.json" for name in TITLES]
    (ROOT / "docs" / "performance.svg").write_text(svg([path for path in files if path.exists()]))


if __name__ == "__main__":
    main()
