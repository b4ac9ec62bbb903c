"""One request as the engine and the pipelines see it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex[:16]}"


@dataclass(kw_only=True)
class OmniDiffusionRequest:
    """A prompt and how to sample it, with every default already resolved.

    ``prompts`` holds the one prompt of the request; it is a list because the model guide's pipelines expect one.
    A pre-processing function may change the request in place before it reaches a pipeline.
    """

    prompts: list[OmniPrompt]
    sampling_params: OmniDiffusionSamplingParams
    request_id: str = field(default_factory=new_request_id)
    extra: dict[str, Any] = field(default_factory=dict)  # what a pre-processing function adds for its pipeline

    @property
    def prompt(self) -> OmniPrompt:
        return self.prompts[0]

    @property
    def num_outputs(self) -> int:
        return self.sampling_params.num_outputs_per_prompt or 1

    @property
    def seeds(self) -> list[int] | None:
        """Seed of each output: ``seed + i``. ``None`` if the noise comes from a generator."""
        seed = self.sampling_params.seed
        return None if seed is None else [seed + i for i in range(self.num_outputs)]
