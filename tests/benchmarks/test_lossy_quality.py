"""The paired figures of ``benchmarks/lossy_quality.py``."""

from __future__ import annotations

import pytest

from benchmarks.lossy_quality import paired_difference


def test_a_difference_is_that_of_the_pictures_whose_verdict_changed():
    exactly_right = [True] * 90 + [False] * 10
    right = [True] * 87 + [False] * 3 + [True] * 1 + [False] * 9
    figures = paired_difference(right, exactly_right)
    assert (figures["lost"], figures["won"]) == (3, 1)
    assert figures["points"] == pytest.approx(-2.0)
    # Variance of a change: (3 + 1) / 100 - 0.02 ** 2.
    assert figures["standard_error"] == pytest.approx(100 * (0.0396 / 100) ** 0.5)
