"""Microseconds of this engine's kernels beside what torch.compile makes of their twins, and of products and attention.

    python -m benchmarks.kernels --json benchmarks/results/kernels.json

Needs a GPU of compute capability 9.0. Shapes are those of FLUX.1-dev at 1024 x 1024 (S = 4608 tokens, D = 3072 wide)
and of Wan 2.2 A14B at 832 x 480 x 81 (S = 32760, D = 5120); random bf16 data. Medians of CUDA events over several
inputs in turns, so that none is still in the cache from the run before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import median, write_json
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionBackend
from vllm_omni.diffusion.attention.backends.sdpa import CudnnAttentionBackend, TorchSdpaBackend
from vllm_omni.diffusion.layers import kernels, norm
from vllm_omni.diffusion.layers.norm import RMSNorm
from vllm_omni.diffusion.layers.operators import scaled_linear
from vllm_omni.diffusion.layers.rope import QKNormRope

Inputs = tuple[torch.Tensor, ...]
NUM_SETS = 4
SIZES = {"flux": (4608, 3072, 24), "wan": (32760, 5120, 40)}


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def microseconds(work: Callable[..., Any], inputs: Callable[[], Inputs], repeats: int = 20) -> float:
    sets = [inputs() for _ in range(NUM_SETS)]
    for each in sets:
        work(*each)
    times = []
    for index in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the host is ahead of the device: launches cost nothing
        start.record()
        work(*sets[index % NUM_SETS])
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return median(times)


def twin(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work`` without kernels."""

    def run(*args: Any) -> Any:
        taken, kernels.HAS_TRITON = kernels.HAS_TRITON, False
        try:
            return work(*args)
        finally:
            kernels.HAS_TRITON = taken

    return run


def fused_kernels() -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for model, (tokens, dim, heads) in SIZES.items():
        float32 = torch.float32 if model == "wan" else torch.bfloat16

        def modulated(tokens: int = tokens, dim: int = dim, dtype: torch.dtype = float32) -> Inputs:
            return drawn(1, tokens, dim), *drawn(3, 1, 1, dim, dtype=dtype).unbind(0), drawn(1, tokens, dim)

        norms = [RMSNorm(dim if model == "wan" else 128).to("cuda", torch.bfloat16) for _ in range(2)]
        rope = QKNormRope(heads)

        def projected(tokens: int = tokens, dim: int = dim) -> Inputs:
            return drawn(1, tokens, 3 * dim), drawn(tokens, 64, dtype=torch.float32)

        cases: dict[str, tuple[Callable[..., Any], Callable[[], Inputs]]] = {
            "norm, modulate": (lambda x, a, b, _, u: norm.layer_norm_modulate(x, a, b, 1e-6), modulated),
            "gated residual": (lambda x, a, b, _, u: norm.gated_residual(x, a, u), modulated),
            "gated residual, norm, modulate": (
                lambda x, a, b, g, u: norm.gated_residual_norm_modulate(x, g, u, a, b, 1e-6),
                modulated,
            ),
            "QK norm, rotation": (lambda qkv, angle, n=norms, r=rope: r(qkv, *n, (angle, angle))[:2], projected),
        }
        for name, (work, inputs) in cases.items():
            results[f"{model}: {name}"] = {
                "eager": microseconds(twin(work), inputs),
                "inductor": microseconds(twin(torch.compile(work, dynamic=True)), inputs),
                "kernel": microseconds(work, inputs),
            }
            print(f"{model}: {name}", {k: round(v, 1) for k, v in results[f"{model}: {name}"].items()}, flush=True)
            torch.compiler.reset()
    return results


def gelu_and_quantization() -> dict[str, dict[str, float]]:
    from vllm_omni.diffusion.layers.kernels.norm import gated_residual_norm_modulate, layer_norm_modulate
    from vllm_omni.diffusion.layers.kernels.quantize import quantize_rows

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    def cat_gelu(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, gelu(x)], dim=-1)

    def quantized(x: torch.Tensor) -> Inputs:
        scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def modulated() -> Inputs:
        return drawn(4608, 3072), *drawn(3, 1, 3072).unbind(0), drawn(4608, 3072)

    cases: dict[str, tuple[Callable[..., Any], Callable[[], Inputs]]] = {
        "gelu 12288, inductor": (torch.compile(gelu), lambda: (drawn(4608, 12288),)),
        "cat(attention, gelu), inductor": (torch.compile(cat_gelu), lambda: (drawn(4608, 3072), drawn(4608, 12288))),
        "gelu to fp8, inductor": (torch.compile(lambda x: quantized(gelu(x))), lambda: (drawn(4608, 12288),)),
        "gelu to fp8, kernel": (lambda x: quantize_rows(x, None, True), lambda: (drawn(4608, 12288),)),
        "cat(attention, gelu) to fp8, kernel": (
            lambda a, x: quantize_rows(x, a, True),
            lambda: (drawn(4608, 3072), drawn(4608, 12288)),
        ),
        "3072 to fp8, inductor": (torch.compile(quantized), lambda: (drawn(4608, 3072),)),
        "3072 to fp8, kernel": (lambda x: quantize_rows(x, None, False), lambda: (drawn(4608, 3072),)),
        "norm, modulate to fp8, kernel": (lambda x, a, b, g, u: layer_norm_modulate(x, a, b, 1e-6, True), modulated),
        "gated residual, norm, modulate to fp8, kernel": (
            lambda x, a, b, g, u: gated_residual_norm_modulate(x, g, u, a, b, 1e-6, True),
            modulated,
        ),
    }
    return {name: timed(name, *case) for name, case in cases.items()}


def products() -> dict[str, dict[str, float]]:
    """TFLOP/s of ``[M, K] x [K, N]``, bf16 and FP8 with scales by row and column; ``fp8 layer`` is as layers do it."""
    results: dict[str, dict[str, float]] = {}
    shapes = [(4608, 21504, 3072), (4608, 9216, 3072), (4608, 12288, 3072), (4608, 3072, 15360), (4608, 3072, 12288)]
    shapes += [(4096, 9216, 3072), (4096, 12288, 3072), (4096, 3072, 12288), (4096, 3072, 3072)]
    shapes += [(512, 9216, 3072), (512, 12288, 3072), (512, 3072, 12288), (512, 3072, 3072), (128, 9216, 3072)]
    shapes += [(128, 12288, 3072), (128, 3072, 12288), (128, 3072, 3072), (256, 3072, 12288), (64, 3072, 12288)]
    shapes += [(1, 18432, 3072), (1, 9216, 3072), (32760, 15360, 5120), (32760, 5120, 13824)]
    for m, n, k in shapes:
        flops = 2 * m * n * k

        def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w, b)

        def linear_gelu(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch._addmm_activation(b, x, w.t(), use_gelu=True)

        def scaled(
            x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor
        ) -> torch.Tensor:
            return scaled_linear(x, sx, w, sw, b, torch.bfloat16)

        def inputs(m: int = m, n: int = n, k: int = k) -> Inputs:
            return drawn(m, k), drawn(n, k), drawn(n)

        def fp8_inputs(m: int = m, n: int = n, k: int = k) -> Inputs:
            x, w = drawn(m, k, dtype=torch.float8_e4m3fn), drawn(n, k, dtype=torch.float8_e4m3fn)
            scales = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
            return x, w, drawn(n), *scales

        name = f"{m} x {n} x {k}"
        results[name] = {}
        for kind, (work, draw) in {
            "bf16": (linear, inputs),
            "bf16 gelu": (linear_gelu, inputs),
            "fp8": (twin(scaled), fp8_inputs),
            "fp8 layer": (scaled, fp8_inputs),
        }.items():
            try:
                time_us = microseconds(work, draw, 10)
                results[name] |= {kind: time_us, f"{kind} TFLOP/s": flops / time_us / 1e6}
            except RuntimeError as error:
                print(name, kind, str(error).splitlines()[0])
        print(name, {key: round(value, 1) for key, value in results[name].items()}, flush=True)
    return results


def attention() -> dict[str, dict[str, float]]:
    results = {}
    backends = (CudnnAttentionBackend(), FlashAttentionBackend(), TorchSdpaBackend())
    for batch, tokens, keys, heads in [
        (1, 4608, 4608, 24),
        (1, 4224, 4224, 24),
        (1, 1152, 1152, 24),
        (8, 1152, 1152, 24),
        (1, 9216, 9216, 24),
        (1, 16384, 16384, 24),
        (1, 32760, 32760, 40),
        (1, 32760, 512, 40),
    ]:
        flops = 4 * batch * tokens * keys * heads * 128

        def inputs(b: int = batch, s: int = tokens, k: int = keys, h: int = heads) -> Inputs:
            return drawn(b, s, h, 128), drawn(b, k, h, 128), drawn(b, k, h, 128)

        name = f"{batch} x {tokens} x {keys}, {heads} heads"
        results[name] = {}
        for backend in backends:
            if backend.why_unavailable(torch.device("cuda", 0)) is not None:
                continue
            if keys > 20000 and isinstance(backend, TorchSdpaBackend) and backend.name == "TORCH_SDPA":
                continue

            def work(*qkv: torch.Tensor, backend: Any = backend) -> torch.Tensor:
                return backend.forward(*qkv, softmax_scale=128**-0.5, causal=False, attn_mask=None)

            time_us = microseconds(work, inputs, 8)
            results[name] |= {backend.name: time_us, f"{backend.name} TFLOP/s": flops / time_us / 1e6}
        print(name, {key: round(value, 1) for key, value in results[name].items()}, flush=True)
    return results


def overlaps() -> dict[str, dict[str, float]]:
    """Two products one after the other, and on two streams; one product of everything, and in parts."""
    side = torch.cuda.Stream()

    def both(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> Inputs:
        return F.linear(x, w, b), F.linear(y, v, b)

    def apart(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> Inputs:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = F.linear(y, v, b)
        first = F.linear(x, w, b)
        torch.cuda.current_stream().wait_stream(side)
        return first, second

    results = {}
    for rows in (512, 128, 1):
        for n, k in ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)):

            def inputs(rows: int = rows, n: int = n, k: int = k) -> Inputs:
                return drawn(4096, k), drawn(n, k), drawn(n), drawn(rows, k), drawn(n, k)

            name = f"4096 and {rows} x {n} x {k}"
            results[name] = {"one stream": microseconds(both, inputs), "two streams": microseconds(apart, inputs)}
            print(name, {key: round(value, 1) for key, value in results[name].items()}, flush=True)
    results["single-stream block of FLUX.1"] = single_block()
    print(results["single-stream block of FLUX.1"], flush=True)
    return results


def single_block() -> dict[str, float]:
    """Its products and GELU: two fused products, or four, GELU in the epilogue of one of them."""

    def fused(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> Inputs:
        qkv, mlp = F.linear(x, w, b).split((9216, 12288), dim=-1)
        return qkv, F.linear(torch.cat([x, F.gelu(mlp, approximate="tanh")], dim=-1), v, c)

    def parts(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> Inputs:
        qkv = F.linear(x, w[:9216], b[:9216])
        mlp = torch._addmm_activation(b[9216:], x, w[9216:].t(), use_gelu=True)
        return qkv, torch.addmm(F.linear(x, v[:, :3072], c), mlp, v[:, 3072:].t())

    def inputs() -> Inputs:
        return drawn(4608, 3072), drawn(21504, 3072), drawn(21504), drawn(3072, 15360), drawn(3072)

    return {"fused": microseconds(torch.compile(fused), inputs), "parts": microseconds(parts, inputs)}


def timed(name: str, work: Callable[..., Any], inputs: Callable[[], Inputs]) -> dict[str, float]:
    figures = {"us": microseconds(work, inputs)}
    print(name, round(figures["us"], 1), flush=True)
    return figures


PARTS: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
    "fused": fused_kernels,
    "gelu_and_quantization": gelu_and_quantization,
    "products": products,
    "attention": attention,
    "overlaps": overlaps,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for part in args.parts:
        try:
            results[part] = PARTS[part]()
        except Exception as error:
            print(f"{part}: {type(error).__name__}: {error}", file=sys.stderr)
            results[part] = {"error": str(error)}
        write_json(args.json, results)


if __name__ == "__main__":
    main()
