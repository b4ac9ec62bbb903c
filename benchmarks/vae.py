"""Seconds to decode with a full-size autoencoder of random weights, by what it computes with.

    python -m benchmarks.vae flux --json benchmarks/results/vae_flux.json
    python -m benchmarks.vae qwen-image --json benchmarks/results/vae_qwen_image.json
    python -m benchmarks.vae wan --height 480 --width 832 --frames 81 --json benchmarks/results/vae_wan.json

Needs a GPU. bfloat16, batch 1. ``channels-last`` is what the engine runs; ``weights channels-last`` changes the memory
of weights alone, and ``compiled`` is ``torch.compile`` of the decoder. The error is that of the pixels of a small
picture against float32, as the norm of the difference over the norm. ``first_s`` is the first call, with what it
compiles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size import exclusive, shared, synchronize
from benchmarks.full_size_models import MODELS
from benchmarks.kernel_profile import write_profile
from benchmarks.report import environment, median, write_json
from vllm_omni.diffusion.encoders.causal_conv import use_single_frame_convolutions
from vllm_omni.diffusion.encoders.channels_last import use_channels_last
from vllm_omni.diffusion.model_loader.components import default_dtype, fill_with_random_weights


def weights_channels_last(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            order = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=order)


def compiled(vae: Any) -> None:
    vae.decoder.forward = torch.compile(vae.decoder.forward)


VARIANTS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "eager": (),
    "weights channels-last": (weights_channels_last,),
    "channels-last": (use_channels_last,),
    "compiled": (compiled,),
    "compiled, weights channels-last": (weights_channels_last, compiled),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=tuple(VARIANTS), choices=VARIANTS)
    parser.add_argument("--height", type=int, default=1024, help="pixels")
    parser.add_argument("--width", type=int, default=1024, help="pixels")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--benchmark", action="store_true", help="let cuDNN time its algorithms")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each variant")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def built(args: argparse.Namespace, dtype: torch.dtype, *changes: Callable[[Any], None]) -> Any:
    folder = MODELS[args.model].path
    name = json.loads((folder / "model_index.json").read_text())["vae"][1]
    model_class = getattr(importlib.import_module("diffusers"), name)
    with torch.device(args.device), default_dtype(dtype):
        vae = model_class.from_config(model_class.load_config(str(folder / "vae"))).eval()
    fill_with_random_weights(vae)
    for change in changes:
        change(vae)
    if args.frames == 1 and "z_dim" in vae.config:
        use_single_frame_convolutions(vae)
    return vae


def latents(args: argparse.Namespace, vae: Any, height: int, width: int, frames: int) -> torch.Tensor:
    """``[1, C, height / 8, width / 8]``, or with frames before the height."""
    generator = torch.Generator().manual_seed(0)
    if "z_dim" in vae.config:
        shape: tuple[int, ...] = (1, vae.config.z_dim, (frames - 1) // 4 + 1, height // 8, width // 8)
    else:
        shape = (1, vae.config.latent_channels, height // 8, width // 8)
    return torch.randn(shape, generator=generator).to(args.device, vae.dtype)


@torch.inference_mode()
def measured(args: argparse.Namespace, name: str, expected: torch.Tensor) -> dict[str, Any]:
    with shared(args.lock):
        vae = built(args, torch.bfloat16, *VARIANTS[name])
        given = latents(args, vae, args.height, args.width, args.frames)

        def decode() -> torch.Tensor:
            pixels: torch.Tensor = vae.decode(given, return_dict=False)[0]
            return pixels

        started = time.perf_counter()
        decode()
        synchronize(args.device)
        first_s = time.perf_counter() - started
        decode()
    with exclusive(args.lock):
        synchronize(args.device)
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds, host_seconds = [], []
        for _ in range(args.trials):
            started = time.perf_counter()
            decode()
            host_seconds.append(time.perf_counter() - started)
            synchronize(args.device)
            seconds.append(time.perf_counter() - started)
        if args.profile is not None:
            write_profile(args.profile / f"vae-{args.model}-{name.replace(' ', '-').replace(',', '')}.txt", decode)
    figures = {"seconds": median(seconds), "host_s": median(host_seconds), "first_s": first_s}
    if args.device.startswith("cuda"):
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(args.model, name, figures, file=sys.stderr, flush=True)
    figures["error"] = difference(small(args, vae), expected)
    print(args.model, name, "error", figures["error"], file=sys.stderr, flush=True)
    return figures


def small(args: argparse.Namespace, vae: Any) -> torch.Tensor:
    given = latents(args, vae, 128, 192, min(args.frames, 9))
    pixels: torch.Tensor = vae.decode(given, return_dict=False)[0]
    return pixels.float()


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def main() -> None:
    args = parse_args()
    torch.backends.cudnn.benchmark = args.benchmark
    results: dict[str, Any] = {
        "environment": environment(torch.device(args.device)),
        "model": args.model,
        "size": [args.width, args.height, args.frames],
        "cudnn_benchmark": args.benchmark,
    }
    with torch.inference_mode():
        expected = small(args, built(args, torch.float32))
    for name in args.variants:
        try:
            results[name] = measured(args, name, expected)
        except Exception as error:  # another variant may run
            results[name] = {"error": str(error).strip().splitlines()[:1]}
            print(args.model, name, repr(error)[:500], file=sys.stderr, flush=True)
        torch.compiler.reset()
    write_json(args.json, results)


if __name__ == "__main__":
    main()
