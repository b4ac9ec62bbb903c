"""A model on paper of how a denoising step scales over GPUs: floating-point operations and bytes, no measurement.

    python -m benchmarks.scaling

Seconds of a forward are those of its products and of its attention at fixed rates, divided by the ranks that share
them, plus what is sent at a fixed bandwidth. docs/features/parallel.md holds the table that this prints.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of an H100 in bf16, from profiles of one GPU (benchmarks/results/parallel_2x_h100.json): what large products and
# attention reach per second, and what takes as long however many ranks there are (modulations, which read weights for
# one row, and gaps).
GEMM_FLOPS = 680e12
ATTENTION_FLOPS = 680e12
FIXED_S = 6e-3
MEMORY_BYTES = 2e12  # per second, read and written, by copies
NVLINK_BYTES = 220e9  # per second, GPU and direction, that NCCL reached with 25 to 100 MB
NETWORK_BYTES = 40e9  # per second and GPU between nodes, of 50e9 (400 Gbit/s)
LATENCY_S = 20e-6  # of one collective
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


LINKS = {"NVLink": NVLINK_BYTES, "400 Gbit/s": NETWORK_BYTES, "PCIe 4": 20e9, "10 Gbit/s": 1.1e9}


def bandwidth(num_ranks: int) -> float:
    """The slowest link of a group of consecutive GPUs."""
    return NVLINK_BYTES if num_ranks <= GPUS_PER_NODE else NETWORK_BYTES


def one(model: Model) -> float:
    tokens = model.num_image + model.num_text
    return FIXED_S + model.gemm_flops(tokens) / GEMM_FLOPS + model.attention_flops / ATTENTION_FLOPS


def ulysses(model: Model, ranks: int, link: float | None = None) -> float:
    """Text is on every rank; three tensors go out and one comes back in each layer."""
    local = model.num_image / ranks
    compute = model.gemm_flops(local + model.num_text) / GEMM_FLOPS + model.attention_flops / ranks / ATTENTION_FLOPS
    exchanged = 4 * local * model.width * 2
    sent, copied = exchanged * (ranks - 1) / ranks, 2 * exchanged + exchanged / 2  # packed; heads are joined again
    seconds = sent / (link or bandwidth(ranks)) + copied / MEMORY_BYTES + 2 * LATENCY_S
    return FIXED_S + compute + model.num_layers * seconds


def ring(model: Model, ranks: int) -> float:
    """Keys and values travel while attention runs; what does not fit behind it shows."""
    local = model.num_image / ranks
    compute = model.gemm_flops(local + model.num_text) / GEMM_FLOPS
    attention = model.attention_flops / ATTENTION_FLOPS * (local + model.num_text) / (model.num_image + model.num_text)
    turn = 2 * local * model.width * 2 / bandwidth(ranks) + LATENCY_S
    travel = model.num_layers * (ranks - 1) * turn
    merged = model.num_layers * (ranks - 1) * 3 * (local + model.num_text) * model.width * 2 / MEMORY_BYTES
    return FIXED_S + compute + max(attention, travel) + merged + model.num_layers * LATENCY_S


def tensor(model: Model, ranks: int, link: float | None = None) -> float:
    """Sums over the ranks, of all tokens."""
    summed = (model.num_image + model.num_text) * model.width * 2
    sent = 2 * (ranks - 1) / ranks * summed
    compute = FIXED_S + (one(model) - FIXED_S) / ranks
    return compute + model.num_sums * (sent / (link or bandwidth(ranks)) + LATENCY_S)


def sharded_weights(model: Model, ranks: int, link: float) -> float:
    """HSDP: a block's weights come while the one before it computes; a forward on each rank."""
    received = 2 * model.gemm_params * (ranks - 1) / ranks
    return max(one(model), received / link) / ranks


def pipeline(model: Model, ranks: int, link: float, rows: int) -> float:
    """Not built: blocks on different ranks, ``rows`` forwards on their way at a time. Latents go round at each step."""
    handed_over = (model.num_image + model.num_text) * model.width * 2 / link + LATENCY_S
    return max((one(model) + ranks * handed_over) / rows, one(model) / ranks, handed_over)


def guided(seconds: float) -> float:
    """Two branches on two groups: one exchange of the predictions, which is small."""
    return seconds + LATENCY_S


def main() -> None:
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
