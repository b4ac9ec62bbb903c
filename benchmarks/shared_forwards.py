"""Milliseconds of a forward by its number of rows, for pictures of several sizes: what sharing a forward can gain.

    python -m benchmarks.shared_forwards --json benchmarks/results/shared_forwards.json
    python -m benchmarks.shared_forwards --folder vllm_omni/assets/shapes-qwen-image --device cpu --dtype float32 \
        --modes eager --sides 64 128 256 --token-side 32 --text-tokens 24 --rows 1 2 4 8 \
        --json benchmarks/results/shared_forwards_cpu.json

A Qwen-Image transformer with random weights; the full-size one needs a GPU with 80 GB. The gain is how much longer as
many forwards of one row take than one of several rows. It bounds what requests of unlike sizes can gain by being packed
into one forward: packing gives the same number of tokens the same products, and attention more to look up.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import OUR_MODES, built, measured, on_device
from benchmarks.full_size_models import MODELS, Inputs
from benchmarks.report import environment, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a model whose configuration to take; absent: the full-size one")
    parser.add_argument("--modes", nargs="+", default=("compiled", "eager"), choices=OUR_MODES)
    parser.add_argument("--sides", nargs="+", type=int, default=(256, 384, 512, 768), help="pixels")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument(
        "--token-side", type=int, default=16, help="pixels of a token; 32 for the model that ships along"
    )
    parser.add_argument("--text-tokens", type=int, default=128, help="at most 128")
    parser.add_argument("--layers", type=int, help="blocks, for a quick look; absent: all")
    parser.add_argument("--forwards", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(namespace=argparse.Namespace(model="qwen-image", lock=None, profile=None, clocks=False))


def inputs_of(args: argparse.Namespace, transformer: Any, side: int, num_rows: int) -> Inputs:
    """Rows that are alike but for nothing: only time counts."""
    scaled = side * 16 // args.token_side
    inputs = on_device(MODELS[args.model].inputs(True, scaled, scaled), args.device)
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = text[:, : args.text_tokens, : transformer.txt_in.input_size]
    rows = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.to(getattr(torch, args.dtype)).expand(num_rows, *value.shape[1:]).contiguous()
        rows[name] = value
    return rows


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_omni.diffusion.compile import apply_compile
    from vllm_omni.diffusion.cuda_graph import apply_cuda_graphs

    results: dict[str, Any] = {}
    for mode in args.modes:
        transformer, od_config = built(args, OUR_MODES[mode])
        transformer.to(getattr(torch, args.dtype))
        apply_compile(transformer, od_config)
        apply_cuda_graphs(transformer, od_config)
        results[mode] = {}
        for side in args.sides:
            milliseconds: dict[int, float] = {}
            for num_rows in args.rows:
                inputs = inputs_of(args, transformer, side, num_rows)
                name = f"{mode}, {side} x {side}, {num_rows} rows"
                milliseconds[num_rows] = measured(args, name, functools.partial(transformer, **inputs))["ms"]
            gains = {rows: rows * milliseconds[args.rows[0]] / ms for rows, ms in milliseconds.items()}
            results[mode][str(side)] = {"ms": milliseconds, "gain": gains}
        write_json(args.json, {"results": results})
        del transformer
        torch.compiler.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return results


def main() -> None:
    args = parse_args()
    if args.folder is not None:
        MODELS[args.model] = dataclasses.replace(MODELS[args.model], folder=str(args.folder.resolve()))
    results = {
        "environment": environment(torch.device(args.device)),
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "folder")},
        "results": measure(args),
    }
    print(json.dumps(results["results"], indent=1))
    write_json(args.json, results)


if __name__ == "__main__":
    main()
