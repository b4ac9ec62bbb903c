"""Fit the coefficients of TeaCache for a model, from runs of it without a cache.

    python -m tools.fit_teacache MODEL --prompt "a cat" --prompt "a harbour at night" --steps 50 --json fit.json

Between neighbouring steps, the relative change of the transformer's modulated input is held against that of its output
(arXiv:2411.19108, section 3.3), and a polynomial from the first to the second is fitted by least squares. A few dozen
prompts of the kind that the model will serve, at their usual size and number of steps, make a sound fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.cache.apply import cached_transformers, put_before, require_extractors
from vllm_omni.diffusion.cache.reuse import relative_changes
from vllm_omni.diffusion.staged_forward import StagedForward
from vllm_omni.diffusion.step_memory import ForwardRow

CHANGES_PER_COEFFICIENT = 20


@dataclass
class Recorder:
    """Computes every step, and notes how input and output of a row changed since the step before."""

    inputs: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)

    def run(self, stages: StagedForward, rows: Sequence[ForwardRow], component: str) -> torch.Tensor:
        modulated_input, output = stages.modulated_input(), stages.run()
        for index, row in enumerate(rows):
            new = (modulated_input[index : index + 1], output[index : index + 1])
            old = row.recall(component)
            if old is not None:
                changes = relative_changes(list(zip(new, old, strict=True)))
                self.inputs.append(changes[0])
                self.outputs.append(changes[1])
            row.remember(component, new, skipped=False)
        return output

    def fit(self, degree: int) -> dict[str, Any]:
        """The coefficients, the highest degree first, with the range that they hold for and their error."""
        num_inputs = len(set(self.inputs))
        if num_inputs <= degree:
            raise SystemExit(
                f"{num_inputs} different changes do not fix a polynomial of degree {degree}; run more steps"
            )
        coefficients = np.polyfit(self.inputs, self.outputs, degree)
        error = np.polyval(coefficients, self.inputs) - np.asarray(self.outputs)
        return {
            "coefficients": coefficients.tolist(),
            "warnings": self._warnings(coefficients),
            "num_changes": len(self.inputs),
            "input_range": [min(self.inputs), max(self.inputs)],
            "output_range": [min(self.outputs), max(self.outputs)],
            "root_mean_square_error": float(np.sqrt(np.mean(error**2))),
        }

    def _warnings(self, coefficients: np.ndarray) -> list[str]:
        """Why not to trust a fit: a larger change of the input must not count as a smaller one of the output."""
        warnings = []
        needed = CHANGES_PER_COEFFICIENT * len(coefficients)
        if len(self.inputs) < needed:
            warnings.append(
                f"{len(self.inputs)} changes are few for {len(coefficients)} coefficients, {needed} would do;"
                " give more prompts"
            )
        changes = np.linspace(min(self.inputs), max(self.inputs), 1001)
        values = np.polyval(coefficients, changes)
        falling = changes[:-1][np.diff(values) < 0]
        if falling.size:
            turns = np.count_nonzero(np.diff(np.sign(np.diff(values))))
            warnings.append(
                f"the polynomial falls within the range of its changes, from {falling[0]:.4g} on, and turns"
                f" {turns} times; a lower --degree, or more prompts, may mend that"
            )
        if values.min() < 0:
            warnings.append(
                f"the polynomial is below 0 at {changes[values.argmin()]:.4g}, within the range of its changes; a lower"
                " --degree, or more prompts, may mend that"
            )
        return warnings


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--prompt", action="append", required=True, help="repeat it for several")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--image", type=Path, action="append", help="picture that goes with every prompt")
    parser.add_argument("--params", type=json.loads, default={}, help="sampling parameters as a JSON object")
    parser.add_argument("--options", type=json.loads, default={}, help="engine options as a JSON object")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--json", type=Path, help="file to write the fit to")
    return parser.parse_args(argv)


def record(omni: Omni, args: argparse.Namespace) -> dict[str, Recorder]:
    """What each transformer of the model did while it ran the prompts."""
    pipeline = omni._engine._executor._worker._runner.pipeline  # type: ignore[union-attr]
    recorders = {}
    for component, class_name in cached_transformers(omni.od_config).items():
        recorders[component] = Recorder()
        put_before(pipeline, component, class_name, recorders[component])
    values = {"seed": args.seed, "output_type": "latent"} | args.params
    if args.steps is not None:
        values["num_inference_steps"] = args.steps
    extra: dict[str, Any] = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    if args.image is not None:
        extra["multi_modal_data"] = {"image": [path.read_bytes() for path in args.image]}
    omni.generate([{"prompt": prompt, **extra} for prompt in args.prompt], OmniDiffusionSamplingParams(**values))
    return recorders


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with Omni(args.model, **args.options) as omni:
        require_extractors(omni.od_config, "fitting TeaCache")
        fits = {component: recorder.fit(args.degree) for component, recorder in record(omni, args).items()}
    for component, fit in fits.items():
        for warning in fit["warnings"]:
            print(f"warning: {component}: {warning}", file=sys.stderr)
    text = json.dumps(fits, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
