"""The table of what goes with what in docs/features/parallel.md is what a run of every pair shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.generation import distance_in_fp8, generate, largest_difference
from tests.parallel.layouts import DBCACHE, TEACACHE
from tests.parallel.models import requests_of
from tests.parity import LATENT_TOLERANCE
from vllm_omni.diffusion.distributed.layout import ParallelLayout, check_layout
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.errors import FeatureNotAvailableError

pytestmark = pytest.mark.parallel
PAGE = Path(__file__).parent.parent.parent / "docs/features/parallel.md"
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2},
    "Ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "CFG": {"cfg_parallel_size": 2},
    "HSDP": {"use_hsdp": True, "hsdp_shard_size": 2},
}
FEATURES = {
    "tea_cache": TEACACHE,
    "cache_dit": DBCACHE,
    "compiled": {"enforce_eager": False},
    "FP8": {"quantization": "fp8"},
}


def pair(pool, folder, row, column):
    """What the cell of two options says; a pair that works must give the latents of one process.

    In FP8, where ranks round otherwise, it must be as near to full precision as one process is.
    """
    features = FEATURES.get(column, {})
    options = {**LAYOUTS[row], **LAYOUTS.get(column, {}), **features}
    if options.get("use_hsdp") and {"ulysses_degree", "ring_degree"} & options.keys():
        del options["hsdp_shard_size"]  # the ranks of the sequence hold the parts
    try:
        layout = check_layout(configure(folder, {"device": "cpu", **options}))
    except FeatureNotAvailableError:
        return "refused"
    expected = generate(folder, {"device": "cpu", **features}, *requests_of("qwen_image"))
    if column == "FP8":
        exact = generate(folder, {"device": "cpu"}, *requests_of("qwen_image"))
        distance, limit = (lambda outputs: distance_in_fp8(outputs, exact)), 1.25 * distance_in_fp8(expected, exact)
    else:
        distance, limit = (lambda outputs: largest_difference(outputs, expected)), LATENT_TOLERANCE
    for outputs in pool[layout.world_size].run(
        generate, folder, {"device": "cpu", **options}, *requests_of("qwen_image")
    ):
        assert distance(outputs) <= limit, f"{row} with {column}"
    return "yes"


def test_the_table_of_what_goes_with_what_is_true(two_ranks, four_ranks, folders):
    pool, columns = {2: two_ranks, 4: four_ranks}, [*LAYOUTS, *FEATURES]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in LAYOUTS:
        cells = ["" if row == column else pair(pool, folders("qwen_image"), row, column) for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(), f"paste this into {PAGE.name}:\n{table}"


def test_a_layout_counts_the_ranks_of_a_replica():
    layout = ParallelLayout(data=2, cfg=2, ring=2, ulysses=3, tp=1)
    assert layout.world_size == 12
    assert layout.product == "data_parallel_size=2 x cfg_parallel_size=2 x ring_degree=2 x ulysses_degree=3"
