"""What a server costs and what its scheduler gains, each against what it must be held against, in one run.

    python -m benchmarks.serving throughput --json benchmarks/results/serving_throughput.json
    python -m benchmarks.serving mixed --json benchmarks/results/serving_mixed.json

``throughput``: pictures per second of clients that keep a server busy, beside ``Omni.generate`` of as many at once, and
the CPU time of a picture. ``offline`` steps as many together as the engine takes by default, ``offline_same_batches``
as many as the server took in the turn before it, which chooses by what it measures. Both include post-processing; the
server's also PNG, base64 and HTTP. Clients only send and read bytes. The server needs a core more than the engine
alone, so nothing else may run on the machine.
``mixed``: nine of ten requests are small, the tenth takes twenty times as many steps. The 95th percentile of the small
ones' latency and the throughput, with the default policy and with whole requests one after the other (``fcfs`` with one
seat). Each server is a process of its own; both get the same requests from the same number of clients. All arguments
after ``--`` are given to the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import write_json
from benchmarks.server_process import cpu_seconds, server, split_arguments
from vllm_omni import Omni, OmniDiffusionSamplingParams

PROMPT = "a large red circle left of a small blue square on a yellow background"
ROWS_OF_A_REQUEST = 2  # one output, with guidance


@dataclass(frozen=True)
class Load:
    """Requests by their number of steps, and how many clients send them, each waiting for its answer."""

    steps: tuple[int, ...]
    num_clients: int
    side: int


async def run_load(address: str, load: Load) -> tuple[float, list[tuple[int, float]]]:
    """``(seconds of all, [(steps, latency in seconds), ...])``."""
    waiting = list(enumerate(load.steps))[::-1]
    latencies: list[tuple[int, float]] = []

    async def send() -> None:
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        while waiting:
            seed, steps = waiting.pop()
            started = time.perf_counter()
            size = f"{load.side}x{load.side}"
            await post(reader, writer, {"prompt": PROMPT, "size": size, "seed": seed, "num_inference_steps": steps})
            latencies.append((steps, time.perf_counter() - started))
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(load.num_clients)))
    return time.perf_counter() - started, latencies


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Ask for a picture and read the whole answer, without decoding it.

    Written by hand, as the clients share the server's cores: one of OpenAI's takes as long for a picture as the server.
    """
    content = json.dumps(body).encode()
    lines = ("POST /v1/images/generations HTTP/1.1", "Host: benchmark", "Content-Type: application/json")
    writer.write("\r\n".join((*lines, f"Content-Length: {len(content)}", "", "")).encode() + content)
    status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in headers if line.startswith("content-length:"))
    answer = await reader.readexactly(length)
    if status.split()[1] != "200":
        raise RuntimeError(f"{status}: {answer[:500]!r}")


def measure_throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Pictures per second, in turns of one and the other so that a drift of the machine touches both alike."""
    names = ("http", "offline_same_batches", "offline")
    rates: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    batch_sizes: list[float] = []
    with Omni(args.model, show_progress=False) as omni, server(*model_of(args), *args.options) as (address, pid):

        def offline(num_requests: int, max_batch_size: int | None = None) -> None:
            params = [
                OmniDiffusionSamplingParams(
                    height=args.side, width=args.side, num_inference_steps=args.steps, seed=seed
                )
                for seed in range(num_requests)
            ]
            for start in range(0, num_requests, args.num_clients):
                batch = params[start : start + args.num_clients]
                omni.generate([PROMPT] * len(batch), batch, max_batch_size=max_batch_size)

        def online(num_requests: int) -> None:
            asyncio.run(run_load(address, Load((args.steps,) * num_requests, args.num_clients, args.side)))

        def measure(name: str, work: Callable[..., None], *options: int) -> None:
            process = pid if name == "http" else "self"
            started, before = time.perf_counter(), cpu_seconds(process)
            work(args.num_requests, *options)
            rates[name].append(args.num_requests / (time.perf_counter() - started))
            cpu[name].append((cpu_seconds(process) - before) / args.num_requests)

        offline(args.num_clients)
        online(3 * args.num_clients)
        for _ in range(args.trials):
            before = steps_and_rounds(address)
            measure("http", online)
            num_steps, num_rounds = (
                after - then for after, then in zip(steps_and_rounds(address), before, strict=True)
            )
            batch_sizes.append(num_steps / num_rounds)
            measure("offline_same_batches", offline, ROWS_OF_A_REQUEST * round(batch_sizes[-1]))
            measure("offline", offline)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    costs = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        "pictures_per_second": rates,
        "cpu_seconds_per_picture": cpu,
        "requests_per_step_of_the_server": batch_sizes,
        "ratio": medians["http"] / medians["offline"],
        "ratio_same_batches": medians["http"] / medians["offline_same_batches"],
        "cpu_ratio": costs["offline"] / costs["http"],
        "cpu_ratio_same_batches": costs["offline_same_batches"] / costs["http"],
    }


def steps_and_rounds(address: str) -> tuple[float, float]:
    """How many steps requests of a server took so far, and in how many rounds, each a step of some of them."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#"))
    return float(lines["vllm_omni_batch_size_sum"]), float(lines["vllm_omni_batch_size_count"])


def measure_mixed(args: argparse.Namespace) -> dict[str, Any]:
    """The same mixed load on a server of each policy."""
    long_steps = 20 * args.steps
    steps = [long_steps if index % 10 == 0 else args.steps for index in range(args.num_requests)]
    random.Random(0).shuffle(steps)
    load = Load(tuple(steps), args.num_clients, args.side)
    policies = {"shortest": (), "whole requests, first come": ("--scheduling-policy", "fcfs", "--max-num-seqs", "1")}
    results: dict[str, Any] = {"num_small": steps.count(args.steps), "num_long": steps.count(long_steps)}
    for name, options in policies.items():
        with server(*model_of(args), *options, *args.options) as (address, _):
            asyncio.run(run_load(address, Load((args.steps,) * 16, 4, args.side)))
            seconds, latencies = asyncio.run(run_load(address, load))
        small = [latency for num_steps, latency in latencies if num_steps == args.steps]
        long = [latency for num_steps, latency in latencies if num_steps == long_steps]
        results[name] = {
            "requests_per_second": len(steps) / seconds,
            "small_p95_s": statistics.quantiles(small, n=20)[-1],
            "small_median_s": statistics.median(small),
            "long_max_s": max(long),
        }
    ours, theirs = (results[name] for name in policies)
    results["p95_gain"] = theirs["small_p95_s"] / ours["small_p95_s"]
    results["throughput_ratio"] = ours["requests_per_second"] / theirs["requests_per_second"]
    return results


def model_of(args: argparse.Namespace) -> tuple[str, ...]:
    return () if args.model is None else (args.model,)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "mixed"))
    parser.add_argument("--model", help="folder or hub id; absent: the model that ships along")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=20, help="steps of a (small) request")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--num-clients", type=int, default=16)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    own, options = split_arguments(sys.argv[1:])
    return parser.parse_args(own, argparse.Namespace(options=options))


def main() -> None:
    args = parse_args()
    results = measure_throughput(args) if args.what == "throughput" else measure_mixed(args)
    settings = {name: getattr(args, name) for name in ("side", "steps", "num_requests", "num_clients", "options")}
    results = {"settings": settings, **results}
    print(results)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
