from __future__ import annotations

import json

import pytest

from vllm_omni.benchmarks.timing import LatencySummary, alternate, environment, write_json
from vllm_omni.version import __version__


def test_candidates_take_turns_and_warm_up_unmeasured():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, num_warmup=1)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_a_summary_interpolates_between_trials():
    summary = LatencySummary.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (summary.median_s, summary.min_s, summary.max_s) == (3.0, 1.0, 5.0)
    assert summary.p90_s == pytest.approx(4.6)
    assert LatencySummary.of([2.0]).p90_s == 2.0


def test_results_are_written_with_their_environment(tmp_path):
    write_json(None, {})
    write_json(tmp_path / "deep" / "er.json", {"figure": 1.5})
    written = json.loads((tmp_path / "deep" / "er.json").read_text())
    assert written["figure"] == 1.5
    assert written["environment"]["versions"]["vllm-omni"] == __version__
    assert written["environment"]["hardware"] == environment()["hardware"]
