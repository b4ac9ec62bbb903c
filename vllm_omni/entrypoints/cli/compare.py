"""``vllm-omni compare``: the same work on this engine and on diffusers, and a report of speed and outputs."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_omni.benchmarks.similarity import lpips_distance, psnr, ssim
from vllm_omni.benchmarks.timing import LatencySummary, environment, write_json
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.entrypoints.cli.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    check_writable,
    count,
    count_or_zero,
    engine_values,
    read_picture,
    sampling_values,
)
from vllm_omni.entrypoints.cli.compare_engines import (
    Call,
    Workload,
    check_parameters,
    check_reference_attention,
    reference_class,
    resolved_calls,
)
from vllm_omni.entrypoints.cli.compare_measure import EngineResult, measure_apart, measure_together
from vllm_omni.entrypoints.cli.compare_report import html_report, markdown_report, summary_lines, write_pictures
from vllm_omni.entrypoints.omni import choose_model
from vllm_omni.errors import ComparisonError, InvalidConfigError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

_PROMPT = "a large red circle left of a small blue square on a yellow background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a diffusers pipeline, or a hub id; absent: the model that ships along",
    )
    parser.add_argument("--against", choices=("diffusers",), default="diffusers", help="the other engine")
    parser.add_argument("--prompt", action="append", help="what to show; repeat it for several prompts")
    parser.add_argument("--negative-prompt", help="what to keep away from; it makes classifier-free guidance possible")
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="picture to work on; repeatable")
    parser.add_argument(
        "--num-warmup", type=count_or_zero, default=1, metavar="N", help="unmeasured runs of each first (default: 1)"
    )
    parser.add_argument(
        "--num-trials", type=count, default=3, metavar="N", help="measured runs of each per prompt (default: 3)"
    )
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run each engine in a process of its own, one after the other, instead of in turns; this also tells their"
        " memory apart (default: on a GPU, which need not hold both)",
    )
    parser.add_argument("--reference-compile", action="store_true", help="let diffusers compile its repeated blocks")
    parser.add_argument("--reference-attention", metavar="NAME", help="diffusers' attention backend, by its name there")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="folder for report.html, report.md, results.json and the pictures (default: %(default)s)",
    )
    add_sampling_arguments(parser)
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out: check, measure, compare the outputs, write the reports."""
    options = engine_values(vars(arguments))
    if options.get("load_format") == "dummy":
        raise InvalidConfigError(
            "load_format='dummy': two engines have the same weights only if they read them from files; leave it out",
            option="load_format",
        )
    check_writable("output-dir", arguments.output_dir / "report.html")
    given = {"seed": 0, **sampling_values(vars(arguments))}
    config = configure(choose_model(arguments.model, None), options)
    options.pop("revision", None)  # it chose the folder
    workload = Workload(
        model=config.model,
        prompts=tuple(_prompts(arguments)),
        params=OmniDiffusionSamplingParams(**given),
        options=options,
        num_warmup=arguments.num_warmup,
        num_trials=arguments.num_trials,
        compile_reference=arguments.reference_compile,
        reference_attention=arguments.reference_attention,
    )
    check_reference_attention(arguments.reference_attention)
    check_parameters(reference_class(config.model_class_name), workload.prompts, given)
    calls = resolved_calls(config, workload)
    isolated = config.torch_device.type == "cuda" if arguments.isolate is None else arguments.isolate
    measured = (measure_apart if isolated else measure_together)(config, workload, calls)
    results = _results(config, workload, measured, calls, isolated)
    _write(arguments.output_dir, results, measured, calls[0].images)
    print("\n".join(summary_lines(results)))
    print(arguments.output_dir / "report.html")


def _prompts(arguments: argparse.Namespace) -> list[OmniPrompt]:
    pictures = None if arguments.image is None else [read_picture(path) for path in arguments.image]
    prompts: list[OmniPrompt] = []
    for text in [_PROMPT] if arguments.prompt is None else arguments.prompt:
        prompt: OmniPrompt = {"prompt": text}
        if arguments.negative_prompt is not None:
            prompt["negative_prompt"] = arguments.negative_prompt
        if pictures is not None:
            prompt["multi_modal_data"] = {"image": pictures}
        prompts.append(prompt)
    return prompts


def _results(
    config: OmniDiffusionConfig,
    workload: Workload,
    measured: Mapping[str, EngineResult],
    calls: Sequence[Call],
    isolated: bool,
) -> dict[str, Any]:
    """All that the reports tell, as JSON takes it."""
    ours, theirs = measured["vllm-omni"], measured["diffusers"]
    engines = {name: _engine_figures(result) for name, result in measured.items()}
    distance, lpips_note = lpips_distance()
    outputs = [
        {"prompt": prompt, "seed": calls[prompt].seeds[index], **_similarity(mine, other, distance)}
        for prompt in range(len(calls))
        for index, (mine, other) in enumerate(_paired(ours.outputs[prompt], theirs.outputs[prompt]))
    ]
    return {
        "environment": environment(config.torch_device),
        "model": config.model,
        "pipeline": config.model_class_name,
        "device": config.device,
        "dtype": config.dtype,
        "isolated": isolated,
        "options": dict(workload.options),
        "num_warmup": workload.num_warmup,
        "num_trials": workload.num_trials,
        "prompts": [{**call.texts, "parameters": _plain(call.parameters), "seeds": list(call.seeds)} for call in calls],
        "engines": engines,
        "latency_ratio": engines["vllm-omni"]["median_s"] / engines["diffusers"]["median_s"],
        "outputs": outputs,
        "lpips": lpips_note,
    }


def _engine_figures(result: EngineResult) -> dict[str, Any]:
    seconds = [value for trials in result.seconds for value in trials]
    num_outputs = sum(
        len(outputs) * len(trials) for outputs, trials in zip(result.outputs, result.seconds, strict=True)
    )
    return {
        **dataclasses.asdict(LatencySummary.of(seconds)),
        "outputs_per_s": num_outputs / math.fsum(seconds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "load_s": result.load_s,
        "seconds": result.seconds,
        **result.facts,
    }


def _paired(
    ours: Sequence[Sequence[Image.Image]], theirs: Sequence[Sequence[Image.Image]]
) -> list[tuple[Sequence[Image.Image], Sequence[Image.Image]]]:
    """Outputs side by side. Raises ``ComparisonError`` if they are not of one size and kind."""
    shapes = [[(frame.size, frame.mode) for output in outputs for frame in output] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1] or len(ours) != len(theirs):
        described = [f"{len(shape)} of {shape[0] if shape else 'nothing'}" for shape in shapes]
        raise ComparisonError(
            f"the outputs cannot be compared: vllm-omni made {described[0]}, diffusers {described[1]}; ask for a size"
            " that both keep"
        )
    return list(zip(ours, theirs, strict=True))


def _similarity(ours: Sequence[Image.Image], theirs: Sequence[Image.Image], distance: Any) -> dict[str, Any]:
    """Means over the frames of an output. PSNR is that of the mean error, and None where nothing differs."""
    pairs = list(zip(ours, theirs, strict=True))
    errors = [10 ** (-psnr(mine, other) / 10) for mine, other in pairs]
    mean_error = math.fsum(errors) / len(errors)
    return {
        "identical": mean_error == 0,
        "psnr_db": None if mean_error == 0 else -10 * math.log10(mean_error),
        "ssim": math.fsum(ssim(mine, other) for mine, other in pairs) / len(pairs),
        "lpips": None if distance is None else math.fsum(distance(*pair) for pair in pairs) / len(pairs),
    }


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value not in ({}, None)}


def _write(
    folder: Path, results: Mapping[str, Any], measured: Mapping[str, EngineResult], inputs: Sequence[bytes]
) -> None:
    ours, theirs = measured["vllm-omni"].outputs, measured["diffusers"].outputs
    pairs = [pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine, other, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_pictures(folder, pairs, results)
    write_json(folder / "results.json", results)
    (folder / "report.md").write_text(markdown_report(results, paths), encoding="utf-8")
    (folder / "report.html").write_text(html_report(results, pairs, inputs), encoding="utf-8")
