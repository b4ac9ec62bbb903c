"""A server of a full-size model with random weights: what sharing steps gains, and how long a newcomer waits.

    python -m benchmarks.serving_full_size qwen-image --json benchmarks/results/serving_qwen_image.json
    python -m benchmarks.serving_full_size qwen-image --json FILE -- --no-enforce-eager
    python -m benchmarks.serving_full_size wan --one-text-layer --json benchmarks/results/serving_wan.json

Needs a GPU with 80 GB. The server is a process of its own and is asked over HTTP; what follows ``--`` are its options.
Its tokenizer is that of the model that ships along.

``qwen-image``: requests per second of one client and of eight, each of which sends its next request when it has its
answer, with guidance (two rows a request) and without. Prompts differ, so the text encoder runs for each.
Both: a short request arrives while a long one is on its way. It should be done at most one step of the long one later
than alone; steps are timed by the events that the server sends after each. Of ``wan``, the long one is a video.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.full_size_generate import copied
from benchmarks.full_size_models import MODELS
from benchmarks.report import write_json
from benchmarks.server_process import server, split_arguments
from vllm_omni.benchmarks.load import PlannedRequest, RequestGroup, plan_requests, run_load
from vllm_omni.entrypoints.omni import SHIPPED_MODELS

_PATHS = {"qwen-image": "/v1/images/generations", "wan": "/v1/videos/sync"}
_TASKS = {"qwen-image": "text-to-image", "wan": "text-to-video"}
_GUIDANCE = {"guided": {"true_cfg_scale": 4.0, "negative_prompt": " "}, "unguided": {"true_cfg_scale": 1.0}}
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
_PROMPT_NUMBERS = itertools.count()


class Client:
    """Asks a server; each call has a connection of its own."""

    def __init__(self, address: str, path: str) -> None:
        self._netloc = urllib.parse.urlsplit(address).netloc
        self._path = path

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._netloc, timeout=600)

    def generate(self, body: dict[str, Any], request_id: str | None = None) -> dict[str, Any]:
        """The receipt and the timings of a request. Raises ``RuntimeError`` if it failed."""
        connection = self.connect()
        headers = {"Content-Type": "application/json"} | ({} if request_id is None else {"X-Request-Id": request_id})
        connection.request("POST", self._path, json.dumps(body), headers)
        response = connection.getresponse()
        content, receipt = response.read(), response.headers.get("X-Receipt")
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {content[:500]!r}")
        answer: dict[str, Any] = json.loads(content if receipt is None else receipt)
        return answer

    def cancel(self, request_id: str) -> None:
        connection = self.connect()
        connection.request("DELETE", f"/v1/requests/{request_id}")
        connection.getresponse().read()
        connection.close()


def new_prompt() -> str:
    """Texts of equal length, no two of 512 alike."""
    index = next(_PROMPT_NUMBERS)
    one, two, three = (_COLOURS[index // 8**place % 8] for place in range(3))
    return f"a large {one} circle left of a small {two} square on a {three} background"


def measure_clients(client: Client, num_clients: int, num_requests: int, body: dict[str, Any]) -> dict[str, Any]:
    """A closed loop of ``num_clients``."""
    answers: list[dict[str, Any]] = []

    def send(request: PlannedRequest) -> int:
        answers.append(client.generate({**body, "prompt": new_prompt(), "seed": request.index}))
        return 1

    group = RequestGroup(name="all", weight=1.0, task="generate", fields={})
    samples = run_load(plan_requests([group], num_requests, float("inf"), 1.0, 0), send, num_clients)
    if len(answers) < num_requests:
        raise RuntimeError(f"{num_requests - len(answers)} of {num_requests} requests failed")
    seconds = max(sample.finished_s for sample in samples)
    stages = ("queue_s", "prepare_s", "denoise_s", "decode_s", "post_process_s")
    return {
        "requests_per_second": num_requests / seconds,
        "latency_s": statistics.median(sample.latency_s for sample in samples),
        **{name: statistics.median(answer["timings"][name] for answer in answers) for name in stages},
        "peak_memory_gib": max(answer["timings"]["peak_memory_bytes"] for answer in answers) / 2**30,
        "accelerations": answers[-1]["receipt"]["accelerations"],
        "attention_backends": answers[-1]["receipt"]["attention_backends"],
    }


def measure_sharing(client: Client, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests per second by the number of clients, with and without guidance."""
    for name in args.guidance:
        body = {"size": f"{args.side}x{args.side}", "num_inference_steps": args.steps, **_GUIDANCE[name]}
        few = {**body, "num_inference_steps": 4}
        for num_clients in (args.num_clients, 1):
            # Shapes that are new compile, are captured and are measured by the scheduler.
            measure_clients(client, num_clients, args.warmup_rounds * num_clients, few)
        by_clients = {num: measure_clients(client, num, args.rounds * num, body) for num in (1, args.num_clients)}
        rates = [result["requests_per_second"] for result in by_clients.values()]
        yield name, {**{str(num): result for num, result in by_clients.items()}, "gain": rates[1] / rates[0]}


class LongRequest:
    """A long request on its way, and when each of its steps ended. It is cancelled where the block ends."""

    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self._client = client
        self._body = body
        self.step_ends: list[float] = []

    def __enter__(self) -> LongRequest:
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._sender.start()
        time.sleep(0.5)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.cancel("long")
        self._sender.join(60)
        self._watcher.join(60)

    def wait_for_steps(self, num_more: int) -> None:
        goal, ends = len(self.step_ends) + num_more, time.monotonic() + 300
        while len(self.step_ends) < goal:
            if time.monotonic() > ends or not self._watcher.is_alive():
                raise RuntimeError(f"the long request took {len(self.step_ends)} of {goal} steps")
            time.sleep(0.001)

    def _send(self) -> None:
        try:
            self._client.generate({**self._body, "prompt": new_prompt(), "seed": 0}, "long")
        except RuntimeError as error:
            print("the long request ended:", error, file=sys.stderr)

    def _watch(self) -> None:
        connection = self._client.connect()
        connection.request("GET", "/v1/requests/long/events?preview=false")
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data:") and json.loads(line[5:])["step"]:
                self.step_ends.append(time.monotonic())
        connection.close()


def measure_arrival(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """How long requests wait that arrive while a long one runs, in its steps. They arrive at odd moments of a step."""
    is_video = args.model == "wan"
    short = {"size": f"{args.arrival_side}x{args.arrival_side}", "num_inference_steps": args.steps}
    long = {"size": args.long_size, "num_inference_steps": args.long_steps}
    if is_video:
        short["num_frames"], long["num_frames"] = 1, args.long_frames
    else:
        short["negative_prompt"] = long["negative_prompt"] = " "
    client.generate({**short, "prompt": new_prompt(), "num_inference_steps": 2})
    started = time.monotonic()
    client.generate({**short, "prompt": new_prompt()})
    alone_s = time.monotonic() - started
    with LongRequest(client, long) as running:
        running.wait_for_steps(3)
        step_s = statistics.median(b - a for a, b in zip(running.step_ends, running.step_ends[1:], strict=False))
        print(f"a step of the long one takes {step_s:.2f} s, the short one alone {alone_s:.2f} s", flush=True)
        arrivals = []
        for index in range(args.num_arrivals):
            time.sleep(step_s * 0.3 * index)
            started = time.monotonic()
            timings = client.generate({**short, "prompt": new_prompt()})["timings"]
            ended = time.monotonic()
            arrivals.append(
                {
                    "queue_s": timings["queue_s"],
                    "latency_s": ended - started,
                    "delay_s": ended - started - alone_s,
                    "steps_of_the_long_one_meanwhile": sum(started < end < ended for end in running.step_ends),
                }
            )
            print(json.dumps(arrivals[-1]), flush=True)
            running.wait_for_steps(1)
    longest = max(arrival["delay_s"] for arrival in arrivals)
    return {
        "short": short,
        "long": long,
        "long_step_s": step_s,
        "alone_s": alone_s,
        "arrivals": arrivals,
        "longest_delay_s": longest,
        "longest_delay_in_steps": longest / step_s,
    }


def model_folder(args: argparse.Namespace, scratch: Path) -> Path:
    """Configurations of the full-size model, beside the tokenizer of a shipped one, as prompts need some tokenizer."""
    folder = copied(MODELS[args.model].path, scratch, one_text_layer=args.one_text_layer)
    (folder / "tokenizer").symlink_to(SHIPPED_MODELS[_TASKS[args.model]] / "tokenizer")
    return folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=_PATHS)
    parser.add_argument("--folder", type=Path, help="serve this model instead, with its weights")
    parser.add_argument("--one-text-layer", action="store_true", help="where a whole text encoder does not fit")
    parser.add_argument("--side", type=int, default=512, help="pixels of the pictures of several clients")
    parser.add_argument("--steps", type=int, default=10, help="of every request but the long one")
    parser.add_argument("--num-clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client; 0: leave that part out")
    parser.add_argument("--guidance", nargs="+", default=tuple(_GUIDANCE), choices=_GUIDANCE, help="of several clients")
    parser.add_argument("--warmup-rounds", type=int, default=3)
    parser.add_argument("--arrival-side", type=int, default=1024, help="pixels of the picture that arrives")
    parser.add_argument("--num-arrivals", type=int, default=3, help="0: leave that part out")
    parser.add_argument("--long-size", help="absent: 1024x1024 for qwen-image, 832x480 for wan")
    parser.add_argument("--long-steps", type=int, default=200)
    parser.add_argument("--long-frames", type=int, default=81)
    parser.add_argument("--json", type=Path, help="file to write")
    own, options = split_arguments(sys.argv[1:])
    args = parser.parse_args(own, argparse.Namespace(options=options))
    args.long_size = args.long_size or {"qwen-image": "1024x1024", "wan": "832x480"}[args.model]
    return args


def main() -> None:
    args = parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "folder")}
    results: dict[str, Any] = {"settings": settings}
    with tempfile.TemporaryDirectory() as scratch:
        model = (
            [str(args.folder)] if args.folder else [str(model_folder(args, Path(scratch))), "--load-format", "dummy"]
        )
        started = time.perf_counter()
        with server(*model, *args.options) as (address, _):
            results["start_s"] = time.perf_counter() - started
            print(f"[{results['start_s']:.0f} s] the server has started", flush=True)
            client = Client(address, _PATHS[args.model])
            if args.model == "qwen-image" and args.rounds:
                for name, result in measure_sharing(client, args):
                    results[name] = result
                    print(f"[{time.perf_counter() - started:.0f} s] {name}", json.dumps(result), flush=True)
                    write_json(args.json, results)
            if args.num_arrivals:
                results["arrival"] = measure_arrival(client, args)
    print(json.dumps(results.get("arrival")))
    write_json(args.json, results)


if __name__ == "__main__":
    main()
