"""What the engine tells a worker to do next, and what it hears back. Both are small and can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.outputs import StepCacheUse


@dataclass(frozen=True, kw_only=True)
class WorkerCommand:
    """One round of work. Requests are named by id, in the order in which they are to be served."""

    release: tuple[str, ...] = ()  # forget these; they were aborted
    prepare: tuple[OmniDiffusionRequest, ...] = ()
    decode: tuple[str, ...] = ()  # all their steps are done
    step: tuple[str, ...] = ()
    preview: tuple[str, ...] = ()  # of those that take a step: show what they will become
    max_batch_size: int = 1  # rows of one forward
    is_trial: bool = False  # run no compiled code: a size that no request may ever have is not worth compiling
    measure: bool = False  # how long the step takes and what memory the round needs, at the price of a pause

    @property
    def is_empty(self) -> bool:
        return not self.release and self.only_releases

    @property
    def only_releases(self) -> bool:
        """Whether nothing comes of it."""
        return not (self.prepare or self.decode or self.step)


@dataclass(kw_only=True)
class StageTimes:
    """Seconds of a request in the worker, from the begin to the end of each stage."""

    prepare_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0


@dataclass(kw_only=True)
class WorkerOutput:
    """A request that is done. Its output is on the rank's device, or on the CPU if it comes from another process."""

    output: Any
    times: StageTimes
    peak_memory_bytes: int
    step_cache: StepCacheUse | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on the device of a round that was measured."""

    peak_bytes: int  # most that was held above what was held before
    state_bytes: dict[str, int]  # of the requests of the round, by id
    free_bytes: int  # after it
    peer_bytes: int = 0  # held for what ranks write to each other, beside the peak


@dataclass(kw_only=True)
class WorkerResult:
    """What became of a :class:`WorkerCommand`. A request that failed is in ``errors`` and is forgotten.

    The last two are for receipts, and empty while no request has finished.
    """

    finished: dict[str, WorkerOutput] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    previews: dict[str, Any] = field(default_factory=dict)  # uint8 [N, h, w, 3] on the CPU
    step_s: float | None = None  # seconds of the step, None where they cannot be told
    memory: MemoryUse | None = None  # of a round that was to be measured
    attention_backends: tuple[str, ...] = ()
    accelerations: tuple[str, ...] = ()  # what became of those that may not take effect
