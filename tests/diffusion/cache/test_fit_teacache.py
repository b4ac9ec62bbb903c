"""The tool that fits TeaCache's coefficients."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tools import fit_teacache
from vllm_omni import Omni, OmniDiffusionSamplingParams


def test_a_polynomial_is_found_again():
    changes = np.linspace(0.01, 0.3, 60)
    recorder = fit_teacache.Recorder(inputs=list(changes), outputs=list(2 * changes**2 + 0.5 * changes + 0.1))
    fit = recorder.fit(2)
    np.testing.assert_allclose(fit["coefficients"], [2, 0.5, 0.1], atol=1e-9)
    assert fit["root_mean_square_error"] < 1e-9
    assert fit["warnings"] == []


@pytest.mark.parametrize(
    ("num_changes", "outputs", "warnings"),
    [
        (20, lambda x: x, ["20 changes are few for 3 coefficients, 60 would do"]),
        (90, lambda x: 1 - (x - 0.2) ** 2, ["falls within the range of its changes, from 0.2 on, and turns 1 times"]),
        (90, lambda x: x**2 - 0.0005, ["below 0 at 0.01"]),
    ],
)
def test_a_fit_that_is_not_to_be_trusted_is_said(num_changes, outputs, warnings):
    changes = np.linspace(0.01, 0.3, num_changes)
    fit = fit_teacache.Recorder(inputs=list(changes), outputs=list(outputs(changes))).fit(2)
    assert len(fit["warnings"]) == len(warnings)
    assert all(expected in said for expected, said in zip(warnings, fit["warnings"], strict=True))


def test_too_few_steps_are_said():
    with pytest.raises(SystemExit, match="do not fix a polynomial of degree 4"):
        fit_teacache.Recorder(inputs=[0.1, 0.2], outputs=[0.1, 0.2]).fit(4)


def test_a_model_is_fitted_and_takes_what_was_fitted(qwen_folder, tmp_path, capsys):
    size = {"height": 64, "width": 64}
    command = [str(qwen_folder), "--prompt", "a cat", "--prompt", "a red circle", "--negative-prompt", "blurry"]
    command += ["--steps", "6", "--degree", "2", "--params", json.dumps(size), "--json", str(tmp_path / "fit.json")]
    fit_teacache.main(command)
    fit = json.loads((tmp_path / "fit.json").read_text())["transformer"]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"transformer": fit}
    assert "warning: transformer: 20 changes are few for 3 coefficients" in printed.err
    # Two prompts with two branches each, and a change between each of six steps.
    assert fit["num_changes"] == 2 * 2 * 5
    options = {"rel_l1_thresh": 0.2, "coefficients": fit["coefficients"]}
    with Omni(str(qwen_folder), cache_backend="tea_cache", cache_config=options) as omni:
        (output,) = omni.generate("a cat", OmniDiffusionSamplingParams(num_inference_steps=2, **size))
    assert output.receipt.step_cache.num_forwards == 2
