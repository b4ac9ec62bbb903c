"""The page that tells how forwards scale over GPUs holds what the model on paper says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling

PAGE = Path(__file__).parents[2] / "docs" / "features" / "parallel.md"


def test_the_page_has_the_tables_that_the_script_prints(capsys):
    scaling.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 30
    assert [line for line in lines if line not in PAGE.read_text().splitlines()] == []


def test_bytes_and_seconds_of_a_model_that_one_can_follow_by_hand():
    # Three layers, four numbers of 2 bytes a token; 10 tokens and no text.
    model = scaling.Model("", num_layers=3, width=4, num_image=10, num_text=0, gemm_params=100, num_sums=6)
    assert scaling.bytes_of_ulysses(model, 2) == 3 * 4 * 5 * 4 * 2 / 2
    assert scaling.bytes_of_ring(model, 2) == 3 * 2 * 5 * 4 * 2
    assert scaling.bytes_of_tensor(model, 2) == 6 * 10 * 4 * 2
    seconds = scaling.FIXED_S + 2 * 100 * 10 / scaling.GEMM_FLOPS + 4 * 10**2 * 4 * 3 / scaling.ATTENTION_FLOPS
    assert scaling.one(model) == pytest.approx(seconds)
    sums = 6 * (10 * 4 * 2 / scaling.PEER_BYTES + scaling.BARRIER_S)
    assert scaling.tensor(model, 2) == pytest.approx((seconds + scaling.FIXED_S) / 2 + sums)
