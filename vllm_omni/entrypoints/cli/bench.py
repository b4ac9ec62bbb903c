"""``vllm-omni bench``: ``latency``, seconds of a batch from prompts to pictures, and ``serve``, a load on a server."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.benchmarks.timing import LatencySummary, alternate, environment, median, write_json
from vllm_omni.entrypoints.cli import bench_serve
from vllm_omni.entrypoints.cli.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    check_request,
    check_writable,
    count,
    count_or_zero,
    engine_values,
    prompt_of,
    sampling_values,
)
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.outputs import OmniRequestOutput, Receipt

_PROMPT = "a large red circle left of a small blue square on a yellow background"
_COLUMNS = ("batch", "median s", "p90 s", "outputs/s", "s/step", "peak GiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    text = "seconds of one batch, from its prompts to its pictures"
    latency = benchmarks.add_parser("latency", help=text, description=text.capitalize() + ".")
    latency.add_argument("--model", help="folder of a diffusers pipeline, or a hub id; absent: the shipped one")
    latency.add_argument("--prompt", default=_PROMPT, help="the prompt of all requests (default: %(default)s)")
    latency.add_argument("--negative-prompt", help="their negative prompt; it makes classifier-free guidance possible")
    latency.add_argument("--image", type=Path, action="append", metavar="FILE", help="picture to work on; repeatable")
    latency.add_argument(
        "--batch-size", type=count, nargs="+", default=[1], metavar="N", help="requests at once (default: 1)"
    )
    latency.add_argument(
        "--num-warmup", type=count_or_zero, default=1, metavar="N", help="unmeasured runs first (default: 1)"
    )
    latency.add_argument("--num-trials", type=count, default=5, metavar="N", help="measured runs (default: 5)")
    latency.add_argument("--output-json", type=Path, metavar="FILE", help="write results and environment here")
    add_sampling_arguments(latency)
    add_engine_arguments(latency)
    text = "latency and throughput of a server under load"
    bench_serve.add_arguments(benchmarks.add_parser("serve", help=text, description=text.capitalize() + "."))


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out: load, measure each batch size, print a table, write JSON."""
    if arguments.benchmark == "serve":
        bench_serve.run(arguments)
        return
    if arguments.output_json is not None:
        check_writable("output-json", arguments.output_json)
    options = engine_values(vars(arguments))
    params = OmniDiffusionSamplingParams(**{"seed": 0, **sampling_values(vars(arguments))})
    prompt = prompt_of(arguments)
    check_request(arguments.model, None, options, prompt, params)
    started = time.perf_counter()
    with Omni(arguments.model, show_progress=False, **options) as omni:
        load_s = time.perf_counter() - started
        measured = [_measure(omni, prompt, params, size, arguments) for size in arguments.batch_size]
        config = omni.od_config
    receipt = measured[0][1]
    results: dict[str, Any] = {
        "environment": environment(config.torch_device),
        "receipt": dataclasses.asdict(receipt),
        "options": options,
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "max_batch_size": config.max_batch_size,
        "num_warmup": arguments.num_warmup,
        "num_trials": arguments.num_trials,
        "load_s": load_s,
        "batches": [row for row, _ in measured],
    }
    print(
        f"{receipt.model}: {receipt.width} x {receipt.height}, {receipt.num_inference_steps} steps, {receipt.dtype} on"
        f" {results['environment']['hardware']}; {_accelerations(results['batches'])};"
        f" {arguments.num_trials} trials after {arguments.num_warmup} unmeasured; loading {load_s:.1f} s"
    )
    print(_table(results["batches"]))
    write_json(arguments.output_json, results)


def _measure(
    omni: Omni,
    prompt: OmniPrompt,
    params: OmniDiffusionSamplingParams,
    batch_size: int,
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], Receipt]:
    """Seconds of ``batch_size`` requests that are given together, what follows from them, and what ran."""
    outputs: list[OmniRequestOutput] = []

    def generate() -> None:
        outputs[:] = omni.generate([prompt] * batch_size, params)

    times = alternate(
        {"batch": generate},
        arguments.num_trials,
        num_warmup=arguments.num_warmup,
        device=omni.od_config.torch_device,
    )
    summary = LatencySummary.of(times["batch"])
    receipt = outputs[0].receipt
    assert receipt is not None, "a finished request has a receipt"
    num_outputs = sum(len(output.images) for output in outputs)
    row = {
        "batch_size": batch_size,
        "num_outputs": num_outputs,
        "accelerations": list(receipt.accelerations),  # a larger batch may have fallen back
        "seconds": times["batch"],
        **dataclasses.asdict(summary),
        "outputs_per_s": num_outputs / summary.median_s,
        # Of the last trial. The requests take their steps together, so a step is one of the whole batch.
        "seconds_per_step": median([output.metrics.denoise_s / output.metrics.num_steps for output in outputs]),
        "peak_memory_bytes": max(output.metrics.peak_memory_bytes for output in outputs),
    }
    return row, receipt


def _accelerations(rows: Sequence[dict[str, Any]]) -> str:
    """What accelerated the batches: once if it was the same for all, else for each."""
    texts = [", ".join(row["accelerations"]) or "no accelerations" for row in rows]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"batch {row['batch_size']}: {text}" for row, text in zip(rows, texts, strict=True))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [_COLUMNS]
    lines += [
        (
            str(row["batch_size"]),
            f"{row['median_s']:.3f}",
            f"{row['p90_s']:.3f}",
            f"{row['outputs_per_s']:.3f}",
            f"{row['seconds_per_step']:.4f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
