"""UniPC (arXiv:2302.04867), the multistep predictor-corrector, for models that predict a flow.

It works on predictions of the sample, ``x0 = latents - sigma * prediction``, with the half log signal-to-noise ratio
``lambda = log((1 - sigma) / sigma)`` as its time. Predictor and corrector are linear in the latents and in the
predictions, so a step is two weighted sums, whose weights depend on nothing but the noise levels.

Shapes: T steps, B rows, O solver order, ``...`` the latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.schedulers.flow_match import NUM_TRAIN_TIMESTEPS
from vllm_omni.errors import InvalidModelFolderError

# What is supported of a UniPCMultistepScheduler's configuration: name -> (value of a file without it, allowed ones).
_SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": (False, (True,)),
    "predict_x0": (True, (True,)),
    "solver_type": ("bh2", ("bh2",)),
    "solver_order": (2, (1, 2, 3)),
    "lower_order_final": (True, (True,)),
    "final_sigmas_type": ("zero", ("zero",)),
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS, (NUM_TRAIN_TIMESTEPS,)),
    "disable_corrector": ([], ([], ())),
    "solver_p": (None, (None,)),
    "thresholding": (False, (False,)),
    "use_karras_sigmas": (False, (False,)),
    "use_exponential_sigmas": (False, (False,)),
    "use_beta_sigmas": (False, (False,)),
    "use_dynamic_shifting": (False, (False,)),
    "shift_terminal": (None, (None,)),
}

# The first noise level stays below 1, where lambda is finite.
_EPSILON = 1e-6


def check_unipc_config(config: Mapping[str, Any]) -> None:
    """Raises ``InvalidModelFolderError`` for a configuration of diffusers' UniPC that would give another result."""
    for name, (default, allowed) in _SUPPORTED.items():
        value = config.get(name, default)
        if value not in allowed:
            raise InvalidModelFolderError(
                f"scheduler_config.json: {name}={value!r} is not supported by UniPC for flow prediction, which takes"
                f" {' or '.join(repr(choice) for choice in allowed)}"
            )


def unipc_schedule(request: OmniDiffusionRequest, config: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels ``[T + 1]``, the last one 0, and timesteps ``[T]`` of a request, in float32 on the CPU.

    Given ``sigmas`` go through ``flow_shift``, given ``timesteps`` are used as they are. Other timesteps are rounded
    down to integers, which is what the model is shown.
    """
    params = request.sampling_params
    if params.timesteps is not None:
        timesteps = np.asarray(params.timesteps, dtype=np.float64)
        levels = timesteps / NUM_TRAIN_TIMESTEPS
    else:
        if params.sigmas is not None:
            unshifted = np.asarray(params.sigmas, dtype=np.float64)
        else:
            assert params.num_inference_steps is not None, "admission resolves num_inference_steps"
            unshifted = np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, params.num_inference_steps + 1)[:-1]
        shift = config.get("flow_shift", 1.0)
        levels = shift * unshifted / (1 + (shift - 1) * unshifted)
        timesteps = None
    if abs(levels[0] - 1) < _EPSILON:
        levels[0] -= _EPSILON
    if timesteps is None:
        timesteps = np.floor(levels * NUM_TRAIN_TIMESTEPS)
    sigmas = np.append(levels, 0.0)
    return torch.from_numpy(sigmas.astype(np.float32)), torch.from_numpy(timesteps.astype(np.float32))


@dataclass(frozen=True)
class UniPC:
    """UniPC with ``B(h) = expm1(h)`` ("bh2"); ``order`` 2 is the usual one.

    Step i corrects its latents with the prediction that was made from them, then predicts the next latents. The order
    grows from 1 in the first steps and falls to 1 in the last, where higher orders are unstable.
    """

    order: int = 2

    def coefficients(self, sigmas: torch.Tensor) -> torch.Tensor:
        """``sigmas [T + 1] -> [T, 2 O + 5]`` in float32: sigma, the weights of the corrector, those of the predictor.

        Corrector: of the latents, of the corrected latents of the step before, of x0 now and of the last O.
        Predictor: of the corrected latents, of x0 now and of the last O - 1.
        """
        levels = [float(level) for level in sigmas.tolist()]
        num_steps = len(levels) - 1
        table = np.zeros((num_steps, 2 * self.order + 5))
        order = 0
        for step in range(num_steps):
            corrector, predictor = table[step, 1 : self.order + 4], table[step, self.order + 4 :]
            table[step, 0] = levels[step]
            if step == 0:
                corrector[0] = 1
            else:
                corrector[1 : 3 + order] = _corrector_weights(levels, step, order)
            order = min(self.order, num_steps - step, step + 1)
            predictor[: 1 + order] = _predictor_weights(levels, step, order)
        return torch.from_numpy(table).to(sigmas.device, torch.float32)

    def initial_history(self, latents: torch.Tensor) -> Mapping[str, torch.Tensor]:
        # One tensor of zeros serves all names: a step never writes into its history.
        return dict.fromkeys(["corrected", *self._sample_names], torch.zeros_like(latents))

    def step(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        coefficients: torch.Tensor,
        history: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """``latents [B, ...], prediction [B, ...], coefficients [B, 2 O + 5, 1, ...] -> latents [B, ...]``.

        All in float32.
        """
        sample = latents - coefficients[:, 0] * prediction
        past = [history[name] for name in self._sample_names]
        weights = coefficients[:, 1:].unbind(1)
        corrected = _weighted_sum(weights[: self.order + 3], [latents, history["corrected"], sample, *past])
        following = _weighted_sum(weights[self.order + 3 :], [corrected, sample, *past[:-1]])
        samples = dict(zip(self._sample_names, [sample, *past[:-1]], strict=True))
        return following, {"corrected": corrected, **samples}

    @property
    def _sample_names(self) -> list[str]:
        """Past predictions of the sample in the history, the latest first."""
        return [f"sample_{age}" for age in range(1, self.order + 1)]


def _predictor_weights(levels: Sequence[float], step: int, order: int) -> np.ndarray:
    """Weights of the step from ``levels[step]`` to the next: latents, x0 now, and the last ``order - 1`` x0."""
    solution = _Solution.between(levels, step, step + 1, order)
    # The order 2 is simplified, as the paper's authors do it.
    shares = np.full(order - 1, 0.5)
    if order > 2:
        shares = np.linalg.solve(solution.system[:-1, :-1], solution.target[:-1])
    return solution.weights(shares)


def _corrector_weights(levels: Sequence[float], step: int, order: int) -> np.ndarray:
    """Weights of a better ``latents`` at ``levels[step]``: corrected latents before, x0 now, the last ``order`` x0."""
    solution = _Solution.between(levels, step - 1, step, order)
    shares = np.full(1, 0.5) if order == 1 else np.linalg.solve(solution.system, solution.target)
    weights = solution.weights(shares[:-1])
    now = solution.factor * shares[-1]
    weights[1] -= now
    return np.concatenate([weights[:1], [now], weights[1:]])


@dataclass(frozen=True)
class _Solution:
    """The linear system of one step of UniPC, section 3 of the paper; ``ratios`` are its r_k, without the last, 1."""

    scale: float  # of the latents
    factor: float  # of a difference of two x0
    ratios: np.ndarray
    system: np.ndarray
    target: np.ndarray

    @classmethod
    def between(cls, levels: Sequence[float], start: int, stop: int, order: int) -> _Solution:
        alpha = 1 - levels[stop]
        width = _half_log_snr(levels[stop]) - _half_log_snr(levels[start])
        expm1 = math.expm1(-width)
        ratios = np.array(
            [(_half_log_snr(levels[start - k]) - _half_log_snr(levels[start])) / width for k in range(1, order)]
        )
        nodes = np.append(ratios, 1.0)
        target, phi, factorial = [], expm1 / -width - 1, 1
        for k in range(1, order + 1):
            target.append(phi * factorial / expm1)
            factorial *= k + 1
            phi = phi / -width - 1 / factorial
        system = np.stack([nodes**k for k in range(order)])
        return cls(levels[stop] / levels[start], -alpha * expm1, ratios, system, np.array(target))

    def weights(self, shares: np.ndarray) -> np.ndarray:
        """Of the latents, of the latest x0, and of the earlier ones, whose differences count by ``shares``."""
        earlier = self.factor * shares / self.ratios
        return np.concatenate([[self.scale, self.factor - earlier.sum()], earlier])


def _half_log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


def _weighted_sum(weights: Sequence[torch.Tensor], terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = torch.addcmul(total, weight, term)
    return total
