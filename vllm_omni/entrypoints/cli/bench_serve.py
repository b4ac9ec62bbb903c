"""``vllm-omni bench serve``: a load on a server that speaks OpenAI's interface, this one or another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from vllm_omni import envs
from vllm_omni.benchmarks import load_report
from vllm_omni.benchmarks.load import RequestError, RequestGroup, RequestSample, plan_requests, run_load
from vllm_omni.benchmarks.load_client import TASKS, LoadClient, plain_picture
from vllm_omni.benchmarks.timing import write_json
from vllm_omni.entrypoints.cli.arguments import check_writable, count, count_or_zero, read_picture
from vllm_omni.errors import InvalidRequestError, OmniError

_PROMPTS = (
    "a large red circle left of a small blue square on a yellow background",
    "a green star on a white background",
    "a purple triangle above a black cross on an orange background",
    "a small white square on a blue background",
)


class LoadFailedError(OmniError, RuntimeError):
    """No request of a load got a result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8091", help="where the server is (default: %(default)s)")
    add("--api-key", help="its key; absent: VLLM_OMNI_API_KEY, then OPENAI_API_KEY")
    add("--model", help="name of the model in requests; absent: the first that the server lists")
    add(
        "--mix",
        type=_group,
        action="append",
        metavar="[WEIGHT:]KEY=VALUE,...",
        help=f"a kind of request and its share; repeatable. Keys: task ({', '.join(TASKS)}; default generate), slo"
        " (seconds), steps, and fields of the body, as in 9:size=512x512,steps=20,slo=2",
    )
    add("--num-prompts", type=count, default=100, metavar="N", help="requests to send (default: %(default)s)")
    add(
        "--request-rate",
        type=_positive,
        default=math.inf,
        metavar="X",
        help="mean arrivals per second (open loop); inf: all are there at once (default: inf)",
    )
    add(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="X",
        help="shape of the gamma distribution of gaps: 1 is Poisson, less comes in bursts (default: 1)",
    )
    add(
        "--max-concurrency",
        type=count,
        metavar="N",
        help="most requests under way; without a rate, so many clients in a closed loop",
    )
    add(
        "--slo-s",
        type=_positive,
        metavar="X",
        help="seconds within which a request should be done, unless its mix says",
    )
    add("--metric-percentiles", type=_percentiles, default=(50.0, 90.0, 95.0, 99.0), metavar="P,...")
    add("--prompts-file", type=Path, metavar="FILE", help="prompts, one a line; absent: four of coloured shapes")
    add("--image", type=Path, metavar="FILE", help="picture for the task edit; absent: a plain one")
    add(
        "--num-warmup", type=count_or_zero, default=1, metavar="N", help="unmeasured requests of each kind (default: 1)"
    )
    add("--timeout-s", type=_positive, default=600.0, metavar="X", help="longest wait for an answer (default: 600)")
    add("--seed", type=int, default=0, help="of arrivals and of their order (default: 0)")
    add("--output-json", type=Path, metavar="FILE", help="write figures and every request here")
    add("--output-svg", type=Path, metavar="FILE", help="draw latencies here")


def run(arguments: argparse.Namespace) -> None:
    """Carry the command out. Raises ``LoadFailedError`` if no request got a result."""
    for option, path in (("output-json", arguments.output_json), ("output-svg", arguments.output_svg)):
        if path is not None:
            check_writable(option, path)
    groups = [_with_objective(group, arguments.slo_s) for group in arguments.mix or [_group("1:task=generate")]]
    client = _client(arguments)
    planned = plan_requests(groups, arguments.num_prompts, arguments.request_rate, arguments.burstiness, arguments.seed)
    warmup = [
        dataclasses.replace(planned[0], group=group, arrival_s=0.0)
        for group in groups
        for _ in range(arguments.num_warmup)
    ]
    failures = [sample for sample in run_load(warmup, client.send, 1) if sample.error is not None] if warmup else []
    if failures:
        raise LoadFailedError(f"a request of the warm-up failed: {failures[0].error}: {failures[0].error_message}")
    samples = run_load(planned, client.send, arguments.max_concurrency, _Progress(len(planned)))
    summary = load_report.summarize(samples, groups, arguments.metric_percentiles)
    rate = "all at once" if math.isinf(arguments.request_rate) else f"{arguments.request_rate:g} requests/s"
    concurrency = "" if arguments.max_concurrency is None else f", at most {arguments.max_concurrency} under way"
    title = f"{arguments.base_url}: {len(planned)} requests, {rate}{concurrency}, in {summary['duration_s']:.1f} s"
    print(title)
    print(load_report.table(summary))
    _write(arguments, title, summary, samples, groups)
    if summary["num_completed"] == 0:
        first = samples[0]
        raise LoadFailedError(f"no request was completed; the first one: {first.error}: {first.error_message}")


def _client(arguments: argparse.Namespace) -> LoadClient:
    prompts = list(_PROMPTS)
    if arguments.prompts_file is not None:
        try:
            lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"--prompts-file cannot be read: {error}", param="prompts_file") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InvalidRequestError(f"{arguments.prompts_file} holds no prompt", param="prompts_file")
    options: dict[str, Any] = {
        "api_key": arguments.api_key or envs.api_key() or os.environ.get("OPENAI_API_KEY"),
        "prompts": prompts,
        "image": plain_picture() if arguments.image is None else read_picture(arguments.image),
        "timeout_s": arguments.timeout_s,
    }
    try:
        client = LoadClient(arguments.base_url, model=arguments.model, **options)
        if arguments.model is not None:
            return client
        return LoadClient(arguments.base_url, model=client.models()[0], **options)
    except ValueError as error:
        raise InvalidRequestError(str(error), param="base_url") from error
    except RequestError as error:
        raise LoadFailedError(f"{arguments.base_url} does not list its models: {error.kind}: {error}") from error


def _write(
    arguments: argparse.Namespace,
    title: str,
    summary: dict[str, Any],
    samples: list[RequestSample],
    groups: list[RequestGroup],
) -> None:
    infinite = math.isinf(arguments.request_rate)
    results = {
        "base_url": arguments.base_url,
        "request_rate": None if infinite else arguments.request_rate,
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
        "seed": arguments.seed,
        "mix": [dataclasses.asdict(group) for group in groups],
        **summary,
        "requests": [{**dataclasses.asdict(s), "latency_s": s.latency_s} for s in samples],
    }
    write_json(arguments.output_json, results)
    if arguments.output_svg is not None:
        arguments.output_svg.write_text(load_report.plot_svg(samples, groups, title), encoding="utf-8")


class _Progress:
    """A line that counts, where someone watches."""

    def __init__(self, total: int) -> None:
        self._total, self._num_done, self._num_failed = total, 0, 0

    def __call__(self, sample: RequestSample) -> None:
        self._num_done += 1
        self._num_failed += sample.error is not None
        if sys.stderr.isatty():
            end = "\n" if self._num_done == self._total else ""
            print(f"\r{self._num_done}/{self._total}, {self._num_failed} failed", end=end, file=sys.stderr, flush=True)


def _with_objective(group: RequestGroup, slo_s: float | None) -> RequestGroup:
    return group if group.slo_s is not None else dataclasses.replace(group, slo_s=slo_s)


def _group(text: str) -> RequestGroup:
    """``"9:size=512x512,steps=20"`` -> a group."""
    head, separator, rest = text.partition(":")
    weight, pairs = ("1", text) if not separator or "=" in head else (head, rest)
    fields: dict[str, Any] = {}
    for pair in filter(None, pairs.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise argparse.ArgumentTypeError(f"{pair!r} must read KEY=VALUE")
        fields["num_inference_steps" if key == "steps" else key] = _value(value)
    task = fields.pop("task", "generate")
    if task not in TASKS:
        raise argparse.ArgumentTypeError(f"task={task!r} must be one of {', '.join(TASKS)}")
    slo_s = fields.pop("slo", None)
    return RequestGroup(
        name=pairs or task,
        weight=_positive(weight),
        task=task,
        fields=fields,
        slo_s=None if slo_s is None else _positive(str(slo_s)),
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(_positive(part) for part in text.split(","))
    if max(values) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of at most 100, separated by commas")
    return values
