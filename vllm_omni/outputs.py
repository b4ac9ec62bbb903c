"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["completed", "aborted", "failed"]


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """Told after each denoising step of a request: ``step`` of ``num_steps`` are done.

    ``preview`` is there at the steps for which someone asked: uint8 ``[N, h, w, 3]``, smaller than the outputs.
    """

    request_id: str
    step: int
    num_steps: int
    preview: Any = None


@dataclass(kw_only=True)
class RequestMetrics:
    """Seconds and steps of a request per stage, and the peak memory of its device in bytes.

    Stages of requests that share a batch overlap, so their sums exceed the wall clock.
    """

    queue_s: float = 0.0
    prepare_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    post_process_s: float = 0.0
    total_s: float = 0.0
    num_steps: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StepCacheUse:
    """What a step cache did for a request. A forward is that of one output of one branch at one step."""

    num_forwards: int
    num_skipped: int  # forwards whose blocks, or most of them, were skipped


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What really ran, after all defaults."""

    model: str
    pipeline: str
    device: str
    dtype: str
    attention_backends: tuple[str, ...]
    num_inference_steps: int | None
    seeds: tuple[int, ...] | None
    height: int | None
    width: int | None
    guidance: str
    num_frames: int | None = None  # of a video
    fps: float | None = None  # at which a video is meant to be shown
    accelerations: tuple[str, ...] = ()
    step_cache: StepCacheUse | None = None  # None without one


@dataclass(frozen=True, kw_only=True)
class OmniRequestOutput:
    """The result of one prompt. ``images`` has one entry per output, in the form of ``output_type``.

    ``finished`` is True when the request ran to its end; an aborted or failed one has no images,
    and ``error`` says why it failed.
    """

    request_id: str
    prompt: str | None
    images: list[Any] = field(default_factory=list)
    finished: bool = True
    finish_reason: FinishReason = "completed"
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    receipt: Receipt | None = None
    error: BaseException | None = None

    @property
    def flat_images(self) -> list[Any]:
        """Pictures in one list: of a model whose outputs have several layers, each layer is an entry."""
        return [image for entry in self.images for image in (entry if isinstance(entry, list) else [entry])]
