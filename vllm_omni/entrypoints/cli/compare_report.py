"""The report of ``vllm-omni compare``: Markdown beside its pictures, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from vllm_omni.media import write_video

Results = Mapping[str, Any]
# Both engines' frames of one output; a picture is one frame, and so is each layer of a layered one.
Pair = tuple[Sequence[Image.Image], Sequence[Image.Image]]

# Differences of single grey levels are invisible.
_AMPLIFICATION = 16

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dce2, #3a3f47); --quiet: light-dark(#596070, #9aa3b2); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#ffffff, #16181c); color: light-dark(#16181c, #e8eaee); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.quiet { color: var(--quiet); } .wide { overflow-x: auto; } code { overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; margin: .6rem 0 1.6rem; }
figure { margin: 0; } figcaption { color: var(--quiet); }
figure img, figure video { width: 100%; height: auto; border: 1px solid var(--line); image-rendering: auto; }
.small img { image-rendering: pixelated; }
"""


def summary_lines(results: Results) -> list[str]:
    """The result in a few lines of text."""
    lines = [" | ".join(row) for row in _figures(results)]
    return [*lines, _ratio_text(results), *(_likeness(output) for output in results["outputs"])]


def write_pictures(folder: Path, pairs: Sequence[Pair], results: Results) -> list[tuple[str, str]]:
    """Write both engines' outputs below ``folder``. Returns their paths, relative to it."""
    (folder / "outputs").mkdir(exist_ok=True)
    paths = []
    for output, pair in zip(results["outputs"], pairs, strict=True):
        names = []
        for engine, frames in zip(("vllm-omni", "diffusers"), pair, strict=True):
            content, kind = _encoded(frames, _fps(results, output))
            name = f"outputs/prompt{output['prompt'] + 1}-seed{output['seed']}-{engine}.{kind.split('/')[1]}"
            (folder / name).write_bytes(content)
            names.append(name)
        paths.append((names[0], names[1]))
    return paths


def markdown_report(results: Results, paths: Sequence[tuple[str, str]]) -> str:
    """The report in Markdown; it refers to the files of :func:`write_pictures`."""
    header, *rows = _figures(results)
    lines = [f"# {_title(results)}", "", _ratio_text(results), ""]
    lines += [*_markdown_table(header, rows), "", _how(results), "", "## Outputs", ""]
    for output, (ours, theirs) in zip(results["outputs"], paths, strict=True):
        lines += [_caption(results, output), "", _likeness(output), ""]
        cells = [f"![{path}]({path})" if path.endswith(".png") else f"[{path}]({path})" for path in (ours, theirs)]
        lines += [*_markdown_table(["vllm-omni", "diffusers"], [cells]), ""]
    lines += ["## Settings", "", *_markdown_table(["what", "value"], _settings(results)), ""]
    return "\n".join(lines)


def html_report(results: Results, pairs: Sequence[Pair], inputs: Sequence[bytes] = ()) -> str:
    """The report as one HTML file: pictures are data URLs, and nothing is fetched from elsewhere.

    ``inputs`` are the encoded pictures that all prompts work on.
    """
    header, *rows = _figures(results)
    outputs = "".join(
        _html_output(results, output, pair) for output, pair in zip(results["outputs"], pairs, strict=True)
    )
    title = html.escape(_title(results))
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>{html.escape(_ratio_text(results))}</p>
{_html_table(header, rows)}
<p class="quiet">{html.escape(_how(results))}</p>
{_html_inputs(inputs)}<h2>Outputs</h2>
{outputs}
<h2>Settings</h2>
{_html_table(["what", "value"], _settings(results))}
</body>
</html>
"""


def _title(results: Results) -> str:
    return f"{Path(results['model']).name}: vllm-omni and diffusers"


def _ratio_text(results: Results) -> str:
    return f"vllm-omni took {results['latency_ratio']:.3f} times as long as diffusers (ratio of medians in this run)."


def _figures(results: Results) -> list[list[str]]:
    """A header and one row per engine."""
    rows = [["engine", "median", "p90", "outputs/s", "peak memory", "loading", "attention", "accelerations"]]
    for name, engine in results["engines"].items():
        memory = engine["peak_memory_bytes"]
        rows.append(
            [
                name,
                f"{engine['median_s']:.3f} s",
                f"{engine['p90_s']:.3f} s",
                f"{engine['outputs_per_s']:.3f}",
                "shared process" if memory is None else f"{memory / 2**30:.2f} GiB",
                f"{engine['load_s']:.1f} s",
                engine["attention"],
                engine["accelerations"],
            ]
        )
    return rows


def _how(results: Results) -> str:
    turns = (
        "Each engine ran in a process of its own, one after the other."
        if results["isolated"]
        else "Both ran in turns in one process, so their memory cannot be told apart (--isolate does)."
    )
    return (
        f"Seconds from prompt to pictures, one prompt at a time: {results['num_trials']} trials of each prompt after"
        f" {results['num_warmup']} unmeasured. {turns} PSNR and SSIM (Gaussian window of 11 x 11 pixels, sigma 1.5)"
        f" compare 8-bit outputs. LPIPS: {results['lpips']}."
    )


def _likeness(output: Mapping[str, Any]) -> str:
    difference = "identical" if output["identical"] else f"PSNR {output['psnr_db']:.2f} dB"
    lpips = "" if output["lpips"] is None else f", LPIPS {output['lpips']:.4f}"
    return f"prompt {output['prompt'] + 1}, seed {output['seed']}: {difference}, SSIM {output['ssim']:.4f}{lpips}"


def _caption(results: Results, output: Mapping[str, Any]) -> str:
    prompt = results["prompts"][output["prompt"]]
    negative = f" (negative: {prompt['negative_prompt']!r})" if "negative_prompt" in prompt else ""
    return f"{prompt['prompt']!r}{negative}"


def _settings(results: Results) -> list[list[str]]:
    surroundings = results["environment"]
    rows = [["model", results["model"]], ["pipeline", results["pipeline"]]]
    rows += [["device", f"{results['device']} ({surroundings['hardware']})"], ["dtype", results["dtype"]]]
    rows += [[name, str(value)] for name, value in results["options"].items()]
    shared = results["prompts"][0]["parameters"]
    rows += [[name, str(value)] for name, value in shared.items()]
    rows += [["guidance", results["engines"]["vllm-omni"]["guidance"]]]
    rows += [["threads", str(surroundings["num_threads"])], ["Python", surroundings["python"]]]
    return rows + [[package, version] for package, version in surroundings["versions"].items()]


def _fps(results: Results, output: Mapping[str, Any]) -> float | None:
    fps: float | None = results["prompts"][output["prompt"]]["parameters"].get("fps")
    return fps


def _encoded(frames: Sequence[Image.Image], fps: float | None) -> tuple[bytes, str]:
    """A file and its media type: a video where frames have a speed, else a picture; layers side by side."""
    target = io.BytesIO()
    if fps is not None:
        write_video(frames, target, fps)
        return target.getvalue(), "video/mp4"
    _side_by_side(frames).save(target, format="PNG")
    return target.getvalue(), "image/png"


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    if len(frames) == 1:
        return frames[0]
    sheet = Image.new(frames[0].mode, (sum(frame.width for frame in frames), frames[0].height))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index * frame.width, 0))
    return sheet


def _difference(pair: Pair) -> list[Image.Image]:
    """Where the outputs differ, made visible."""
    differences = [
        ImageChops.difference(mine.convert("RGB"), other.convert("RGB")) for mine, other in zip(*pair, strict=True)
    ]
    return [image.point(lambda value: min(255, value * _AMPLIFICATION)) for image in differences]


def _html_output(results: Results, output: Mapping[str, Any], pair: Pair) -> str:
    figures = "".join(
        f"<figure>{_html_media(frames, _fps(results, output), name)}<figcaption>{name}</figcaption></figure>"
        for name, frames in (
            ("vllm-omni", pair[0]),
            ("diffusers", pair[1]),
            (f"difference x {_AMPLIFICATION}", _difference(pair)),
        )
    )
    size = "pair small" if pair[0][0].width < 300 else "pair"
    caption = html.escape(_caption(results, output))
    return f'<p>{caption}<br><span class="quiet">{_likeness(output)}</span></p><div class="{size}">{figures}</div>\n'


def _html_inputs(inputs: Sequence[bytes]) -> str:
    if not inputs:
        return ""
    media = (_html_media([Image.open(io.BytesIO(content))], None, f"input {n}") for n, content in enumerate(inputs, 1))
    figures = "".join(f"<figure>{one}<figcaption>input {n}</figcaption></figure>" for n, one in enumerate(media, 1))
    return f'<h2>Input</h2>\n<div class="pair">{figures}</div>\n'


def _html_media(frames: Sequence[Image.Image], fps: float | None, name: str) -> str:
    content, kind = _encoded(frames, fps)
    address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    if kind.startswith("video/"):
        return f'<video src="{address}" controls loop muted aria-label="{name}"></video>'
    return f'<img src="{address}" alt="{name}" width="{frames[0].width}" height="{frames[0].height}">'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
