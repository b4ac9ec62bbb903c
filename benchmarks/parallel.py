"""Seconds per step and peak memory of full-size models on two GPUs, beside one GPU in the same run.

    python -m benchmarks.parallel --profile profiles --json benchmarks/results/parallel_2x_h100.json

Random weights, bfloat16, compiled blocks, CUDA graphs, batch 1. Guidance is on where its branches are shared, and off
elsewhere. Text encoders are left small: prompts come as embeddings. Both GPUs measure the single one at the same time;
the slower one counts, as it does in every layout. A layout has processes of its own: one that fails or hangs says where
and costs no other one. Results are written after each case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.layout_worker import LAYOUTS, MODELS, begin, measure, profile
from benchmarks.rank_pool import RankPool
from benchmarks.report import write_json

CONFIGS = Path(__file__).parent / "configs"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048], help="guidance runs at the first one")
    parser.add_argument("--short", action="store_true", help="sequences at the last size, other layouts at the first")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one block of two heads, to try the script out on CPUs")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--timeout-s", type=float, default=60, help="of each part of a layout, compilation included")
    parser.add_argument("--deadline-s", type=float, default=float("inf"), help="begin no layout after this time")
    parser.add_argument("--nccl", action="store_true", help="with VLLM_OMNI_PEER_MEMORY=0")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one step of each case; only on GPUs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def cut_down(folder: Path, tiny: bool) -> None:
    """Cut the text encoders of a configuration to one narrow layer and, with ``tiny``, the transformer as well."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        text = config.get("text_config", config)
        for part in (text, config.get("vision_config", {})):
            for name in ("num_hidden_layers", "depth"):
                if name in part:
                    part[name] = 1
        if path.parent.name.startswith("text_encoder"):
            text.update({"vocab_size": 1000, "intermediate_size": 64, "num_layers": 1, "d_ff": 64})
            text.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
        elif tiny:
            config.update({name: 1 for name in ("num_layers", "num_single_layers") if name in config})
            if "num_attention_heads" in config:
                config["num_attention_heads"] = 2
        path.write_text(json.dumps(config))


def cases_of(model: str, layout: str, sizes: list[int], short: bool) -> Iterator[tuple[int, bool]]:
    """Sizes, and whether guidance is on."""
    if short and layout != "one":
        sizes = sizes[-1:] if layout in ("ulysses2", "ring2") else sizes[:1]
    if layout != "cfg2":
        yield from ((size, False) for size in sizes)
    if model == "qwen-image" and layout in ("one", "cfg2"):
        yield sizes[0], True


def compared(results: dict[str, Any]) -> dict[str, float]:
    """Seconds of one GPU over those of each layout, and memory of HSDP over that of one GPU."""
    ratios: dict[str, float] = {}
    one = results.get("one", {})
    for layout, report in results.items():
        for case, values in report.items():
            if layout == "one" or not isinstance(values, dict) or case not in one:
                continue
            ratios[f"{layout} {case}"] = round(one[case]["seconds_per_step"] / values["seconds_per_step"], 3)
            if layout == "hsdp2":
                ratios[f"{layout} {case} memory"] = round(values["peak_memory_gib"] / one[case]["peak_memory_gib"], 3)
    return ratios


def run_layout(pool: RankPool, args: argparse.Namespace, folder: Path, layout: str) -> Iterator[Any]:
    """What is measured of a layout, bit by bit: pairs of a name and a value."""
    options = {"enforce_eager": args.eager, **({"dtype": "bfloat16"} if args.device == "cuda" else {})}
    loaded = pool.run(begin, str(folder), args.device, options, layout, args.nccl, timeout_s=args.timeout_s)
    yield "load_s", max(report["load_s"] for report in loaded)
    yield "peers", loaded[0]["peers"]
    yield "environment", loaded[0]["environment"]
    for size, guided in cases_of(folder.name, layout, args.sizes, args.short):
        case = f"{size}{' guided' if guided else ''}"
        of_ranks = pool.run(measure, folder.name, size, guided, args.steps, args.trials, timeout_s=args.timeout_s)
        values = {name: max(report[name] for report in of_ranks) for name in of_ranks[0] if name != "runs"}
        yield case, {**values, "runs": of_ranks[0]["runs"]}
        if args.profile is not None and args.device == "cuda":
            shares, lines = pool.run(profile, folder.name, size, guided, timeout_s=args.timeout_s)[0]
            yield case, {**values, "runs": of_ranks[0]["runs"], "profile": shares}
            args.profile.mkdir(parents=True, exist_ok=True)
            path = args.profile / f"{folder.name}-{layout}-{case.replace(' ', '-')}.txt"
            path.write_text("\n".join(lines) + "\n")


def main() -> None:
    args, started = parse_args(), time.monotonic()
    results: dict[str, Any] = {"models": {}}
    jobs = [(layout, model) for layout in args.layouts for model in args.models]
    jobs = [job for job in jobs if any(cases_of(job[1], job[0], args.sizes, args.short))]
    pools: list[RankPool] = []

    def say(*words: object) -> None:
        print(f"{time.monotonic() - started:6.1f} s", *words, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            shutil.copytree(CONFIGS / model, Path(temporary) / model)
            cut_down(Path(temporary) / model, args.tiny)
        while jobs and time.monotonic() - started < args.deadline_s:
            layout, model = jobs.pop(0)
            while len(pools) < 1 + min(len(jobs), 1):  # the next one starts while this one measures
                pools.append(RankPool(2, args.device, preload=["benchmarks.layout_worker"]))
            pool = pools.pop(0)
            measured = results["models"].setdefault(model, {"seconds": {}})["seconds"]
            report = measured.setdefault(layout, {})
            try:
                for name, value in run_layout(pool, args, Path(temporary) / model, layout):
                    (results if name == "environment" else report)[name] = value
                    results["models"][model]["ratios"] = compared(measured)
                    if name != "environment":
                        say(model, layout, name, json.dumps(value))
                        write_json(args.json, results)
            except AssertionError as failure:
                say("FAILED", model, layout, failure)
                report["error"] = str(failure).strip().splitlines()[-1]
            pool.close()
    for pool in pools:
        pool.close()
    print(json.dumps({name: value.get("ratios") for name, value in results["models"].items()}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
