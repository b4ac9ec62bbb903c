"""A model on paper of how a denoising step scales over GPUs: floating-point operations and bytes, no measurement.

    python -m benchmarks.scaling

Seconds of a forward are those of its products and of its attention at fixed rates, divided by the ranks that share
them, plus what is sent at a fixed bandwidth. docs/features/parallel.md holds the tables that this prints; the one of
what was measured comes from benchmarks/results/parallel_2x_h100.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "parallel_2x_h100.json"

# Of an H100 in bf16, from profiles of one GPU: what large products and attention reach per second, and what takes as
# long however many ranks there are (modulations, which read weights for one row, and gaps).
GEMM_FLOPS = 680e12
ATTENTION_FLOPS = 680e12
WITH_LSE = 1.06  # times as long where attention returns its log-sum-exp
FIXED_S = 6e-3
MEMORY_BYTES = 2e12  # per second, read and written, by copies
PEER_BYTES = 330e9  # per second, GPU and direction, that ranks of a node read or wrote over NVLink with 25 to 100 MB
NVLINK_BYTES = 220e9  # that NCCL reached there
NETWORK_BYTES = 40e9  # per second and GPU between nodes, of 50e9 (400 Gbit/s)
BARRIER_S = 6e-6  # of ranks that use each other's memory
LATENCY_S = 20e-6  # of one collective of NCCL
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Model:
    """The part of a transformer that grows with its tokens."""

    name: str
    num_layers: int
    width: int
    num_image: int  # tokens
    num_text: int
    gemm_params: float  # that one image token meets
    num_sums: int  # over tensor-parallel ranks, of all tokens

    @property
    def attention_flops(self) -> float:
        return 4 * (self.num_image + self.num_text) ** 2 * self.width * self.num_layers

    def gemm_flops(self, num_tokens: float) -> float:
        return 2 * self.gemm_params * num_tokens


QWEN = {"num_layers": 60, "width": 3072, "gemm_params": 60 * 12 * 3072**2, "num_sums": 120}
# 19 blocks of two streams, 38 of one; a token meets as many parameters in each, and those of one sum once.
FLUX = {"num_layers": 57, "width": 3072, "gemm_params": 57 * 12 * 3072**2, "num_sums": 76}
MODELS = [
    Model("Qwen-Image 1024", num_image=4096, num_text=128, **QWEN),  # type: ignore[arg-type]
    Model("Qwen-Image 2048", num_image=16384, num_text=128, **QWEN),  # type: ignore[arg-type]
    Model("FLUX.1 1024", num_image=4096, num_text=512, **FLUX),  # type: ignore[arg-type]
    Model("FLUX.1 2048", num_image=16384, num_text=512, **FLUX),  # type: ignore[arg-type]
]


LINKS = {"NVLink": None, "400 Gbit/s": NETWORK_BYTES, "PCIe 4": 20e9, "10 Gbit/s": 1.1e9}


def one(model: Model) -> float:
    tokens = model.num_image + model.num_text
    return FIXED_S + model.gemm_flops(tokens) / GEMM_FLOPS + model.attention_flops / ATTENTION_FLOPS


def exchange(ranks: int, link: float | None) -> tuple[float, float]:
    """Bytes per second and seconds of an exchange among consecutive GPUs, by memory of peers if ``link`` is not given
    and one node holds them.
    """
    if link is None and ranks <= GPUS_PER_NODE:
        return PEER_BYTES, BARRIER_S
    return link or NETWORK_BYTES, LATENCY_S


def bytes_of_ulysses(model: Model, ranks: int) -> float:
    """That a rank sends in a forward: three tensors go out and one comes back in each layer."""
    return model.num_layers * 4 * model.num_image / ranks * model.width * 2 * (ranks - 1) / ranks


def bytes_of_ring(model: Model, ranks: int) -> float:
    """Keys and values of a rank, to the next one in each turn but the last."""
    return model.num_layers * (ranks - 1) * 2 * model.num_image / ranks * model.width * 2


def bytes_of_tensor(model: Model, ranks: int) -> float:
    """Sums over the ranks, of all tokens."""
    return model.num_sums * 2 * (ranks - 1) / ranks * (model.num_image + model.num_text) * model.width * 2


def ulysses(model: Model, ranks: int, link: float | None = None) -> float:
    """Text is on every rank. What came back is joined with what was there."""
    local = model.num_image / ranks
    compute = model.gemm_flops(local + model.num_text) / GEMM_FLOPS + model.attention_flops / ranks / ATTENTION_FLOPS
    bandwidth, latency = exchange(ranks, link)
    joined = model.num_layers * 2 * local * model.width * 2 * (ranks - 1) / ranks / MEMORY_BYTES
    sent = bytes_of_ulysses(model, ranks) / bandwidth + model.num_layers * 2 * latency
    return FIXED_S + compute + joined + sent


def ring(model: Model, ranks: int, link: float | None = None) -> float:
    """Keys and values travel while attention runs; what does not fit behind it shows. Outputs are merged in float32."""
    local = model.num_image / ranks
    tokens = local + model.num_text
    compute = model.gemm_flops(tokens) / GEMM_FLOPS
    attention = WITH_LSE * model.attention_flops / ATTENTION_FLOPS * tokens / (model.num_image + model.num_text)
    bandwidth, latency = exchange(ranks, link)
    travel = bytes_of_ring(model, ranks) / bandwidth + model.num_layers * (ranks - 1) * latency
    # Bytes per number: 6 to make an output float32, 12 to merge it with another one, 6 to round what comes out, and 8
    # to put keys and values together.
    merged = model.num_layers * model.width * (tokens * (6 * ranks + 12 * (ranks - 1) + 6) + 8 * local) / MEMORY_BYTES
    return FIXED_S + compute + max(attention, travel) + merged + model.num_layers * latency


def tensor(model: Model, ranks: int, link: float | None = None) -> float:
    """Two ranks read each other's products; more sum through NCCL."""
    bandwidth, latency = exchange(ranks, link)
    if link is None and 2 < ranks <= GPUS_PER_NODE:
        bandwidth, latency = NVLINK_BYTES, LATENCY_S
    compute = FIXED_S + (one(model) - FIXED_S) / ranks
    return compute + bytes_of_tensor(model, ranks) / bandwidth + model.num_sums * latency


def sharded_weights(model: Model, ranks: int, link: float | None) -> float:
    """HSDP: a block's weights come while the one before it computes; a forward on each rank."""
    received = 2 * model.gemm_params * (ranks - 1) / ranks
    return max(one(model), received / (link or NVLINK_BYTES)) / ranks


def pipeline(model: Model, ranks: int, link: float | None, rows: int) -> float:
    """Not built: blocks on different ranks, ``rows`` forwards on their way at a time. Latents go round at each step."""
    handed_over = (model.num_image + model.num_text) * model.width * 2 / (link or NVLINK_BYTES) + LATENCY_S
    return max((one(model) + ranks * handed_over) / rows, one(model) / ranks, handed_over)


def guided(seconds: float) -> float:
    """Two branches on two groups: one exchange of the predictions, which is small."""
    return seconds + LATENCY_S


def print_measured() -> None:
    """What two GPUs gave beside one in the same run, and what this model says of it."""
    print("| | sent | one GPU | two GPUs | speed-up | on paper | aim |\n|---|---|---|---|---|---|---|")
    results = json.loads(RESULTS.read_text())["models"]
    layouts: list[tuple[str, str, Callable[..., float], Callable[[Model, int], float], float]] = [
        ("Ulysses", "ulysses2", ulysses, bytes_of_ulysses, 1.80),
        ("ring", "ring2", ring, bytes_of_ring, 1.65),
        ("tensor", "tp2", tensor, bytes_of_tensor, 1.60),
    ]
    for title, layout, seconds, sent, aim in layouts:
        for model in MODELS:
            name, _, size = model.name.rpartition(" ")
            measured = results[{"FLUX.1": "flux.1-dev", "Qwen-Image": "qwen-image"}[name]]["seconds"]
            if size in measured[layout]:
                alone, shared = (measured[key][size]["seconds_per_step"] for key in ("one", layout))
                print(
                    f"| {title}, {model.name} | {sent(model, 2) / 1e9:.1f} GB | {alone:.4f} | {shared:.4f}"
                    f" | {alone / shared:.2f} | {one(model) / seconds(model, 2):.2f} | {aim:.2f} |"
                )
    alone, shared = (
        results["qwen-image"]["seconds"][key]["1024 guided"]["seconds_per_step"] for key in ("one", "cfg2")
    )
    model = MODELS[0]
    paper = 2 * one(model) / guided(one(model))
    print(f"| CFG, {model.name}, guided | | {alone:.4f} | {shared:.4f} | {alone / shared:.2f} | {paper:.2f} | 1.90 |\n")


def main() -> None:
    print_measured()
    print("| model, one forward | layout | " + " | ".join(f"{n} GPUs" for n in (2, 4, 8, 16)) + " |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        for name, layout in (("Ulysses", ulysses), ("ring", ring), ("tensor", tensor)):
            speedups = [one(model) / layout(model, ranks) for ranks in (2, 4, 8, 16)]
            cells = [f"{s:.2f} ({100 * s / n:.0f} %)" for s, n in zip(speedups, (2, 4, 8, 16), strict=True)]
            print(f"| {model.name} | {name} | " + " | ".join(cells) + " |")
        cells = []
        for ranks in (2, 4, 8, 16):
            rest = ranks // 2
            seconds = guided(one(model) if rest == 1 else ulysses(model, rest))
            speedup = 2 * one(model) / seconds
            cells.append(f"{speedup:.2f} ({100 * speedup / ranks:.0f} %)")
        print(f"| {model.name}, guided | CFG x Ulysses | " + " | ".join(cells) + " |")
    print_links(MODELS[0])


def print_links(model: Model, ranks: int = 2) -> None:
    """Forwards in the time of one on one GPU, over links of different speed."""
    print(f"\n| {model.name}, {ranks} GPUs | " + " | ".join(LINKS) + " |")
    print("|---" * (len(LINKS) + 1) + "|")
    ways = {
        "Ulysses": lambda link: ulysses(model, ranks, link),
        "tensor": lambda link: tensor(model, ranks, link),
        "HSDP, a forward per rank": lambda link: sharded_weights(model, ranks, link),
        "pipeline, one forward": lambda link: pipeline(model, ranks, link, 1),
        f"pipeline, {ranks} forwards": lambda link: pipeline(model, ranks, link, ranks),
        f"pipeline, {2 * ranks} forwards": lambda link: pipeline(model, ranks, link, 2 * ranks),
    }
    for name, seconds in ways.items():
        print(f"| {name} | " + " | ".join(f"{one(model) / seconds(link):.2f}" for link in LINKS.values()) + " |")


if __name__ == "__main__":
    main()
