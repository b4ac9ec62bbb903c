"""What the denoising loop works on: the state of a request, its sampler, and a pipeline of three verbs.

Shapes: N outputs of one request, B rows of one forward, T steps, L condition tokens, ``...`` the latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch

from vllm_omni.diffusion.guidance import Guidance
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.step_memory import StepMemory

# Inputs of one branch. Tensors have one row, shared by all outputs of the request, or one row per output.
# Anything else (a shape, a flag) must be hashable, and requests share a forward only if it is equal.
Conditions = Mapping[str, Any]

# What a sampler remembers of a request: tensors of the shape of its latents, by name.
History = Mapping[str, torch.Tensor]


class Sampler(Protocol):
    """Turns a prediction into the latents of the next step.

    It is a value without state: what it knows of a request's noise levels is a table of coefficients, what it
    remembers is a history, and requests of equal samplers take a step together, each at a step of its own.
    """

    def coefficients(self, sigmas: torch.Tensor) -> torch.Tensor:
        """``sigmas [T + 1] -> [T, K]``: the numbers of each step, made once per request."""
        ...

    def initial_history(self, latents: torch.Tensor) -> History:
        """The history before the first step, from ``latents [N, ...]``. Every step returns the same names."""
        ...

    def step(
        self, latents: torch.Tensor, prediction: torch.Tensor, coefficients: torch.Tensor, history: History
    ) -> tuple[torch.Tensor, History]:
        """``latents [B, ...], prediction [B, ...], coefficients [B, K, 1, ...] -> latents [B, ...]``, new history.

        ``coefficients[:, k]`` broadcasts against the latents. ``history`` must be left as it is, so that a step that
        failed can be tried again.
        """
        ...


@dataclass(slots=True, kw_only=True)
class DenoiseState:
    """Everything that a request needs between two steps. Nothing about a request lives anywhere else."""

    request_id: str
    latents: torch.Tensor  # [N, ...], float32
    sigmas: torch.Tensor  # [T + 1], float32, in [0, 1], the last one 0
    timesteps: torch.Tensor  # [T], float32, in [0, 1000]
    branches: tuple[Conditions, ...]  # the positive one first
    # Conditions that change with the step, one entry per step, added to those of each branch; empty if none do.
    # Steps in a row with the same entry share one object, by which a StepPlan tells that nothing has changed.
    step_conditions: tuple[Conditions, ...] = ()
    sampler: Sampler
    guidance: Guidance | None  # None if there is one branch
    height: int  # pixels
    width: int  # pixels
    step_index: int = 0
    coefficients: torch.Tensor = field(init=False)  # [T, K], the sampler's
    history: History = field(init=False)  # the sampler's, [N, ...] each
    cache: StepMemory = field(default_factory=StepMemory)  # a step cache's, and prepared modulations

    def __post_init__(self) -> None:
        assert len(self.step_conditions) in (0, self.num_steps), "step_conditions has one entry per step, or none"
        for name, value in chain.from_iterable(given.items() for given in (*self.branches, *self.step_conditions)):
            try:
                hash(value)
            except TypeError as error:
                raise TypeError(
                    f"the condition {name!r} cannot be compared between requests ({error}); give a tensor, or something"
                    " hashable, such as a tuple"
                ) from None
        self.coefficients = self.sampler.coefficients(self.sigmas)
        self.history = self.sampler.initial_history(self.latents)

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.latents.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of its tensors and its modulations, which its last step lets go, but for what a step cache remembers."""
        conditions = [value for given in (*self.branches, *self.step_conditions) for value in given.values()]
        tensors = [self.latents, *self.history.values(), *conditions]
        by_id = {id(tensor): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
        return self.cache.modulations_bytes + sum(tensor.nbytes for tensor in by_id.values())

    @property
    def is_done(self) -> bool:
        return self.step_index >= self.num_steps


class SteppedPipeline(Protocol):
    """A pipeline of three verbs, which the engine can drive one step at a time.

    A pipeline may have ``sequence_conditions: ClassVar[Mapping[str, str]]``. It maps a condition ``[1 or N, L, D]``
    whose length may differ between requests to the name of its mask, ``[B, L]`` and True for real tokens, which
    :func:`denoise_step` adds; it is None without padding.
    """

    def prepare(self, request: OmniDiffusionRequest) -> DenoiseState: ...

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """``latents [B, ...], timestep [B] in [0, 1000] -> prediction [B, ...]``: one branch, one forward."""
        ...

    def decode(self, state: DenoiseState) -> torch.Tensor: ...


def is_stepped(pipeline_class: type) -> bool:
    """Whether a pipeline has the three verbs, so that the engine can drive its steps."""
    return all(callable(getattr(pipeline_class, verb, None)) for verb in ("prepare", "predict", "decode"))
