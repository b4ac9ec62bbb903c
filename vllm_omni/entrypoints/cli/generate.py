"""``vllm-omni generate``: a prompt, and pictures if the model takes some, become a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_omni.diffusion.data import TASKS
from vllm_omni.entrypoints.cli.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    check_request,
    check_writable,
    engine_values,
    not_written,
    prompt_of,
    sampling_values,
)
from vllm_omni.entrypoints.omni import SHIPPED_MODELS, Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.media import opaque, write_video
from vllm_omni.outputs import OmniRequestOutput

# What each kind of output can be written as; the first is the default.
_SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".webp"), "video": (".mp4",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("prompt", help="what to show")
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        help="what to make: %(choices)s. Without --model it chooses the model that ships along, for"
        f" {' or '.join(SHIPPED_MODELS)}; with --model it is checked against what the model can do",
        metavar="TASK",
    )
    parser.add_argument(
        "--model",
        help="folder of a diffusers pipeline, or a hub id; absent: the model that ships along for the task",
    )
    parser.add_argument(
        "--output", "-o", type=Path, help="file to write: .png, .jpg, .webp, or .mp4 of a video (default: by the seed)"
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        help="picture to work on, for a model that takes one; repeat it for several",
    )
    parser.add_argument("--negative-prompt", help="what to keep away from; it makes classifier-free guidance possible")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out: load, generate, write, and say where the result is."""
    given = vars(arguments)
    if arguments.output is None:
        check_writable("output", Path("vllm-omni.png"))
    else:
        _check_output(arguments.output, [suffix for suffixes in _SUFFIXES.values() for suffix in suffixes])
    params = OmniDiffusionSamplingParams(**sampling_values(given))
    options = engine_values(given)
    _check_picture(arguments.task, arguments.image)
    prompt = prompt_of(arguments)
    suffixes = _SUFFIXES[check_request(arguments.model, arguments.task, options, prompt, params)]
    if arguments.output is not None:
        _check_output(arguments.output, suffixes)
    started = time.perf_counter()
    with Omni(arguments.model, task=arguments.task, **options) as omni:
        loaded = time.perf_counter()
        (output,) = omni.generate(prompt, params)
    paths = _write(output, arguments.output, suffixes[0])
    for path in paths:
        print(path)
    print(_summary(output, loaded - started))


def _check_picture(task: str | None, image: list[Path] | None) -> None:
    """Without a task, whether a picture is needed is the model's to say."""
    if task is None or TASKS[task] == (image is not None):
        return
    advice = "needs a picture; give --image FILE" if TASKS[task] else "takes no picture; leave --image out"
    raise InvalidRequestError(f"--task {task} {advice}", param="image")


def _check_output(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix.lower() not in suffixes:
        raise InvalidRequestError(
            f"--output {path} must end in {', '.join(suffixes)}: the ending chooses the format", param="output"
        )
    check_writable("output", path)


def _write(output: OmniRequestOutput, path: Path | None, suffix: str) -> list[Path]:
    """One file per picture, layer or video; several are numbered by their place."""
    assert output.receipt is not None, "a finished request has a receipt"
    if path is None:
        seed = output.receipt.seeds[0] if output.receipt.seeds is not None else 0
        path = Path(f"vllm-omni-{seed}{suffix}")
    is_video = suffix in _SUFFIXES["video"]
    results = output.images if is_video else output.flat_images
    paths = [path] if len(results) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(results))]
    for result, target in zip(results, paths, strict=True):
        try:
            if is_video:
                assert output.receipt.fps is not None, "a video model resolves fps"
                write_video(result, target, output.receipt.fps)
            else:
                (opaque(result) if target.suffix.lower() in (".jpg", ".jpeg") else result).save(target)
        except OSError as error:
            raise not_written("output", target, error.strerror or str(error)) from error
    return paths


def _summary(output: OmniRequestOutput, load_s: float) -> str:
    receipt, metrics = output.receipt, output.metrics
    assert receipt is not None
    frames = "" if receipt.num_frames is None else f" x {receipt.num_frames} frames"
    seeds = "" if receipt.seeds is None else f", seed {', '.join(map(str, receipt.seeds))}"
    plural = "" if metrics.num_steps == 1 else "s"
    accelerations = "".join(f"; {text}" for text in receipt.accelerations)
    return (
        f"{receipt.width} x {receipt.height}{frames}, {metrics.num_steps} step{plural}{seeds}: {metrics.total_s:.1f} s"
        f" ({metrics.denoise_s:.1f} s denoising; loading {load_s:.1f} s) on {receipt.device} in {receipt.dtype}"
        f"{accelerations}"
    )
