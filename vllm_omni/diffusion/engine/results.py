"""From what a worker returns to what a user gets: post-processing and receipts."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig, RequestSpec
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerOutput, WorkerResult
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import FinishReason, OmniRequestOutput, Receipt, RequestMetrics, StepCacheUse


@dataclass(kw_only=True)
class TrackedRequest:
    """A request between admission and result."""

    request: OmniDiffusionRequest
    admitted: float  # time.perf_counter() seconds
    scheduled: float | None = None
    num_steps_done: int = 0


class _PostProcess:
    """A model's post-processing function, or none. One of the model guide's takes the output alone and returns PIL;
    one with a second parameter also takes the output type. A rank in this process gives it the output on its device,
    where a picture is made of it faster than by a host with many threads and little time for them."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        self._takes_output_type = function is not None and len(inspect.signature(function).parameters) > 1

    def check(self, request: OmniDiffusionRequest) -> None:
        """Raises ``InvalidRequestError`` for an output type that the model's function cannot make."""
        output_type = request.sampling_params.output_type
        if output_type == "np" and not self._takes_output_type:
            raise InvalidRequestError(
                "output_type='np' is not offered by this model; use 'pil' or 'pt'", param="output_type"
            )
        if output_type == "pil" and self._function is None:
            raise InvalidRequestError("output_type='pil' is not offered by this model; use 'pt'", param="output_type")

    def __call__(self, output: Any, request: OmniDiffusionRequest) -> list[Any]:
        output_type = request.sampling_params.output_type
        if output_type != "latent" and self._function is not None:
            if self._takes_output_type:
                output = self._function(output, output_type)
            elif output_type == "pil":
                output = self._function(output)
        return list(output.cpu() if isinstance(output, torch.Tensor) else output)


class Results:
    """Makes the results of one engine's requests."""

    def __init__(
        self, od_config: OmniDiffusionConfig, spec: RequestSpec | None, post_process: Callable[..., Any] | None
    ) -> None:
        self._post_process = _PostProcess(post_process)
        self._config = od_config
        self._cfg_parameters = ("true_cfg_scale",) if spec is None else spec.cfg_parameters
        self._attention_backends: tuple[str, ...] = ()
        self._accelerations: tuple[str, ...] = ()

    def update(self, result: WorkerResult) -> None:
        """Take in what a worker tells of itself."""
        self._attention_backends, self._accelerations = result.attention_backends, result.accelerations

    def check(self, request: OmniDiffusionRequest) -> None:
        """Raises ``InvalidRequestError`` for an output type that the model cannot make."""
        self._post_process.check(request)

    def output(
        self,
        tracked: TrackedRequest,
        reason: FinishReason,
        *,
        finished: WorkerOutput | None = None,
        error: Exception | None = None,
    ) -> OmniRequestOutput:
        """The result of a request that has ended."""
        request, metrics = tracked.request, RequestMetrics(num_steps=tracked.num_steps_done)
        if tracked.scheduled is not None:
            metrics.queue_s = tracked.scheduled - tracked.admitted
        images: list[Any] = []
        if finished is not None:
            times = finished.times
            metrics.prepare_s, metrics.denoise_s, metrics.decode_s = times.prepare_s, times.denoise_s, times.decode_s
            metrics.peak_memory_bytes = finished.peak_memory_bytes
            started = time.perf_counter()
            try:
                images = self._post_process(finished.output, request)
            except Exception as post_process_error:
                reason, error = "failed", post_process_error
            metrics.post_process_s = time.perf_counter() - started
        metrics.total_s = time.perf_counter() - tracked.admitted
        return OmniRequestOutput(
            request_id=request.request_id,
            prompt=request.prompt.get("prompt"),
            images=images,
            finished=reason == "completed",
            finish_reason=reason,
            metrics=metrics,
            receipt=self._receipt(request, finished) if finished is not None and reason == "completed" else None,
            error=error,
        )

    def _receipt(self, request: OmniDiffusionRequest, finished: WorkerOutput) -> Receipt:
        config, params = self._config, request.sampling_params
        seeds, step_cache = request.seeds, finished.step_cache
        return Receipt(
            model=config.model,
            pipeline=config.model_class_name,
            device=config.device,
            dtype=config.dtype,
            attention_backends=self._attention_backends,
            num_inference_steps=params.num_inference_steps,
            seeds=None if seeds is None else tuple(seeds),
            height=params.height,
            width=params.width,
            guidance=_guidance_text(params, self._cfg_parameters),
            num_frames=params.num_frames,
            fps=params.fps,
            accelerations=(*_accelerations(config, step_cache), *self._accelerations),
            step_cache=step_cache,
        )


def _accelerations(config: OmniDiffusionConfig, step_cache: StepCacheUse | None) -> tuple[str, ...]:
    names = [name for name in ("vae_use_slicing", "vae_use_tiling") if getattr(config.memory, name)]
    if config.enable_prompt_embed_cache:
        names.append("enable_prompt_embed_cache")
    shares = {f.name: (getattr(config.parallel_config, f.name), f.default) for f in fields(config.parallel_config)}
    names += [f"{name}={value}" for name, (value, default) in shares.items() if value != default]
    if step_cache is not None:
        counts = f"skipped {step_cache.num_skipped} of {step_cache.num_forwards} forwards"
        names.append(f"{config.cache.cache_backend}: {counts}")
    return tuple(names)


def _guidance_text(params: OmniDiffusionSamplingParams, cfg_parameters: tuple[str, ...]) -> str:
    parts = []
    scales = [scale for scale in (getattr(params, name) for name in cfg_parameters) if scale is not None]
    if any(scale > 1 for scale in scales):
        parts.append("classifier-free, scale " + ", then ".join(f"{scale:g}" for scale in dict.fromkeys(scales)))
    if params.guidance_scale is not None and "guidance_scale" not in cfg_parameters:
        parts.append(f"embedded, scale {params.guidance_scale:g}")
    return "; ".join(parts) or "none"
