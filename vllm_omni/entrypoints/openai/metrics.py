"""What a server counts and measures, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from vllm_omni.diffusion.engine.engine import EngineRound
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.errors import EngineFailureError, InsufficientMemoryError, NonFiniteOutputError, RankFailureError
from vllm_omni.outputs import FinishReason, OmniRequestOutput

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)
_ERRORS = (EngineFailureError, InsufficientMemoryError, NonFiniteOutputError, RankFailureError)
_STAGES = ("queue_s", "prepare_s", "denoise_s", "decode_s", "post_process_s", "total_s")


class ServerMetrics:
    """One registry per server, so that several may live in one process. The engine's thread tells each round."""

    def __init__(self, omni: AsyncOmni) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "vllm_omni_"
        self._requests = Counter(prefix + "requests", "requests that ended", ["state"], registry=registry)
        self._errors = Counter(prefix + "errors", "requests that failed", ["type"], registry=registry)
        self._responses = Counter(prefix + "http_responses", "answers", ["method", "status"], registry=registry)
        self._steps = Counter(prefix + "steps", "denoising steps of requests", registry=registry)
        self._step_seconds = Histogram(
            prefix + "step_seconds", "seconds of a round of steps", buckets=_SECONDS, registry=registry
        )
        self._batch_sizes = Histogram(
            prefix + "batch_size", "requests that took a step together", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self._stages = Histogram(
            prefix + "stage_seconds", "seconds of a request per stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._cache_forwards = Counter(
            prefix + "step_cache_forwards", "forwards of requests with a step cache", ["result"], registry=registry
        )
        self._peak_memory = Gauge(prefix + "peak_memory_bytes", "most memory of the device", registry=registry)
        # A series that begins with its first event shows no increase then, and a rate of it would miss a first failure.
        for counter, labels in (
            (self._requests, get_args(FinishReason)),
            (self._errors, [kind.__name__ for kind in _ERRORS]),
            (self._cache_forwards, ("skipped", "computed")),
            (self._stages, [stage.removesuffix("_s") for stage in _STAGES]),
        ):
            for label in labels:
                counter.labels(label)
        self._live_gauge("requests_waiting", "requests that no worker has begun", lambda: omni.engine.num_waiting)
        self._live_gauge("requests_running", "requests in progress", lambda: omni.engine.num_running)
        self._live_gauge("replicas_ready", "replicas that begin a request at once", lambda: omni.engine.num_ready)
        self._live_gauge("seconds_of_work", "estimated seconds until all are done", lambda: omni.engine.seconds_of_work)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def observe_response(self, scope: Scope, status: int) -> None:
        # Methods that nobody knows must not make a series each.
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self._responses.labels(method, str(status)).inc()

    def observe_round(self, completed: EngineRound) -> None:
        if completed.progress:
            self._steps.inc(len(completed.progress))
            self._batch_sizes.observe(len(completed.progress))
            self._step_seconds.observe(completed.seconds)
        for output in completed.outputs:
            self._observe_output(output)

    def _observe_output(self, output: OmniRequestOutput) -> None:
        self._requests.labels(output.finish_reason).inc()
        if output.error is not None:
            self._errors.labels(type(output.error).__name__).inc()
        if not output.finished:
            return
        for stage in _STAGES:
            self._stages.labels(stage.removesuffix("_s")).observe(getattr(output.metrics, stage))
        self._peak_memory.set(output.metrics.peak_memory_bytes)
        use = None if output.receipt is None else output.receipt.step_cache
        if use is not None:
            self._cache_forwards.labels("skipped").inc(use.num_skipped)
            self._cache_forwards.labels("computed").inc(use.num_forwards - use.num_skipped)

    def _live_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        gauge = Gauge("vllm_omni_" + name, text, registry=self._registry)
        gauge.set_function(value)
