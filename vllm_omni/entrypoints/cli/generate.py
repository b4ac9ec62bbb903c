"""``vllm-omni generate``: a prompt becomes a file."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import engine_options
from vllm_omni.entrypoints.cli.arguments import add_field_arguments, parse_size
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.outputs import OmniRequestOutput

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("prompt", help="what to show")
    parser.add_argument(
        "--model", help="folder of a diffusers pipeline, or a hub id; absent: the model that ships along"
    )
    parser.add_argument(
        "--output", "-o", type=Path, help="file to write: .png, .jpg or .webp; absent: named by the seed"
    )
    parser.add_argument("--negative-prompt", help="what to keep away from; it makes classifier-free guidance possible")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="size in pixels, as in 1024x768 or 512")
    sampling = parser.add_argument_group("sampling (absent: the model's defaults)")
    fields = dataclasses.fields(OmniDiffusionSamplingParams)
    add_field_arguments(sampling, [(OmniDiffusionSamplingParams, field) for field in fields])
    engine = parser.add_argument_group("engine")
    add_field_arguments(engine, engine_options().values())


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out: load, generate, write, and say where the result is."""
    given = vars(arguments)
    if arguments.output is not None:
        _check_suffix(arguments.output)
    params = OmniDiffusionSamplingParams(**_sampling_values(given))
    options = {name: given[name] for name in engine_options() if name in given}
    prompt: OmniPrompt = {"prompt": arguments.prompt}
    if arguments.negative_prompt is not None:
        prompt["negative_prompt"] = arguments.negative_prompt
    started = time.perf_counter()
    with Omni(arguments.model, **options) as omni:
        loaded = time.perf_counter()
        (output,) = omni.generate(prompt, params)
    paths = _write(output, arguments.output)
    for path in paths:
        print(path)
    print(_summary(output, loaded - started))


def _sampling_values(given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(OmniDiffusionSamplingParams)}
    values = {name: value for name, value in given.items() if name in names}
    if given["size"] is not None:
        for name, value in zip(("width", "height"), given["size"], strict=True):
            if name in values:
                raise InvalidRequestError(f"--size and --{name} exclude each other; give one of them", param=name)
            values[name] = value
    return values


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise InvalidRequestError(
            f"--output {path} must end in {', '.join(PICTURE_SUFFIXES)}: the ending chooses the format", param="output"
        )
    if path.is_dir():
        raise InvalidRequestError(f"--output {path} is a folder; name a file in it", param="output")


def _write(output: OmniRequestOutput, path: Path | None) -> list[Path]:
    """One file per picture; several are numbered by their place."""
    assert output.receipt is not None, "a finished request has a receipt"
    if path is None:
        seed = output.receipt.seeds[0] if output.receipt.seeds is not None else 0
        path = Path(f"vllm-omni-{seed}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    many = len(output.images) > 1
    paths = [path.with_stem(f"{path.stem}-{index}") if many else path for index in range(len(output.images))]
    for picture, target in zip(output.images, paths, strict=True):
        picture.save(target)
    return paths


def _summary(output: OmniRequestOutput, load_s: float) -> str:
    receipt, metrics = output.receipt, output.metrics
    assert receipt is not None
    seeds = "" if receipt.seeds is None else f", seed {', '.join(map(str, receipt.seeds))}"
    return (
        f"{receipt.width} x {receipt.height}, {metrics.num_steps} steps{seeds}: {metrics.total_s:.1f} s"
        f" ({metrics.denoise_s:.1f} s denoising; loading {load_s:.1f} s) on {receipt.device} in {receipt.dtype}"
    )
