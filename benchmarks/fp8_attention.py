"""Microseconds and error of attention in FP8 beside FlashAttention 3 in bfloat16, with what quantizes its inputs.

    python -m benchmarks.fp8_attention --json benchmarks/results/fp8_attention.json

Needs a Hopper GPU and ``fa3-fwd``. Shapes are those of FLUX.1-dev, Qwen-Image and Wan 2.2 A14B; query and key come
from random projections by way of norm and rotation, as in the models. The error is the norm of the difference to
attention in float32 over its norm, for some of the queries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import drawn, microseconds
from benchmarks.report import environment, write_json
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionBackend
from vllm_omni.diffusion.attention.fp8 import attend, attention_dtype, quantize_heads
from vllm_omni.diffusion.layers.norm import RMSNorm
from vllm_omni.diffusion.layers.rope import QKNormRope

HEAD_SIZE = 128
SCALE = HEAD_SIZE**-0.5
CASES = {"flux": (4608, 24, False), "qwen-image": (4224, 24, False), "wan": (32760, 40, True)}
NUM_CHECKED = 256  # queries


def measure(tokens: int, heads: int, across_heads: bool) -> dict[str, float]:
    norms = [RMSNorm(heads * HEAD_SIZE if across_heads else HEAD_SIZE).to("cuda", torch.bfloat16) for _ in range(2)]
    plain = QKNormRope(heads)
    with attention_dtype("fp8"):
        quantizing = QKNormRope(heads)
    backend = FlashAttentionBackend()

    def projected() -> tuple[torch.Tensor, torch.Tensor]:
        return drawn(1, tokens, 3 * heads * HEAD_SIZE), drawn(tokens, HEAD_SIZE // 2, dtype=torch.float32)

    def in_bf16(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return backend.forward(query, key, value, softmax_scale=SCALE, causal=False, attn_mask=None)

    def prepared(layer: QKNormRope) -> Any:
        qkv, angle = projected()
        return layer(qkv, *norms, (angle.cos(), angle.sin()))

    flops = 4 * tokens**2 * heads * HEAD_SIZE
    figures = {
        "value to fp8": microseconds(
            lambda x: quantize_heads(x[..., -heads * HEAD_SIZE :].unflatten(-1, (heads, HEAD_SIZE))).values,
            lambda: (drawn(1, tokens, 3 * heads * HEAD_SIZE),),
        ),
        "bf16": microseconds(in_bf16, lambda: tuple(prepared(plain)), 8),
        "fp8": microseconds(lambda *qkv: attend(*qkv, SCALE, False), lambda: tuple(prepared(quantizing)), 8),
    }
    figures |= {f"{name} TFLOP/s": flops / figures[name] / 1e6 for name in ("bf16", "fp8")}
    qkv, angle = projected()
    rope = (angle.cos(), angle.sin())
    exact = [x.float() for x in plain(qkv, *norms, rope)]
    scores = torch.einsum("bshd,bkhd->bhsk", exact[0][:, :NUM_CHECKED], exact[1]) * SCALE
    expected = torch.einsum("bhsk,bkhd->bshd", scores.softmax(-1), exact[2])
    outputs = {
        "bf16": in_bf16(*plain(qkv, *norms, rope)),
        "fp8": attend(*quantizing(qkv, *norms, rope), SCALE, False),
    }
    for name, output in outputs.items():
        difference = output[:, :NUM_CHECKED].float() - expected
        figures[f"{name} error"] = (difference.norm() / expected.norm()).item()
    return figures


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": environment()}
    for case in args.cases:
        results[case] = measure(*CASES[case])
        print(case, {name: round(value, 4) for name, value in results[case].items()}, flush=True)
        write_json(args.json, results)


if __name__ == "__main__":
    main()
