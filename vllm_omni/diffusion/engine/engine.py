"""The engine: it admits requests, drives their steps, and turns what the workers return into results."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.engine.admission import admit, read_sampling_defaults
from vllm_omni.diffusion.engine.executor import Executor, InProcessExecutor
from vllm_omni.diffusion.engine.scheduler import ScheduledRequest, Scheduler
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerOutput
from vllm_omni.diffusion.worker.model_runner import is_stepped
from vllm_omni.errors import EngineClosedError, InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import FinishReason, OmniRequestOutput, Receipt, RequestMetrics, StepCacheUse, StepProgress


@dataclass(kw_only=True)
class _Tracked:
    """A request between admission and result."""

    request: OmniDiffusionRequest
    admitted: float  # time.perf_counter() seconds
    scheduled: float | None = None
    num_steps_done: int = 0


@dataclass(kw_only=True)
class EngineRound:
    """What one call of :meth:`Engine.step` brought about."""

    progress: list[StepProgress]
    outputs: list[OmniRequestOutput]


class Engine:
    """Serves one model. One thread calls :meth:`add_request` and :meth:`step`; any thread may call :meth:`abort`."""

    def __init__(self, od_config: OmniDiffusionConfig, on_load_progress: LoadProgress | None = None) -> None:
        self.od_config = od_config
        model = resolve_diffusion_model(od_config.model_class_name)
        self._is_stepped = is_stepped(model.pipeline_class)
        self._spec = model.request_spec(od_config)
        self._cfg_parameters = ("true_cfg_scale",) if self._spec is None else self._spec.cfg_parameters
        self._checkpoint_defaults = read_sampling_defaults(od_config)
        self._pre_process = _built(model.get_pre_process_func, od_config)
        self._post_process = _PostProcess(_built(model.get_post_process_func, od_config))
        self._scheduler = Scheduler(od_config.max_num_seqs)
        self._tracked: dict[str, _Tracked] = {}
        self._executor: Executor | None = InProcessExecutor(od_config, on_load_progress)
        self._attention_backends: tuple[str, ...] = ()
        self._accelerations: tuple[str, ...] = ()  # those of the worker

    @property
    def has_requests(self) -> bool:
        return self._scheduler.has_requests

    @property
    def output_kind(self) -> Literal["image", "video"]:
        """Models of videos are those that take a number of frames."""
        return "video" if self._spec is not None and "num_frames" in self._spec.defaults else "image"

    def validate(self, prompt: Any, params: OmniDiffusionSamplingParams) -> OmniDiffusionRequest:
        """A request with all defaults resolved, pre-processed. Raises ``InvalidRequestError``; queues nothing."""
        if self._executor is None:
            raise EngineClosedError("the engine is closed; create a new one")
        request = admit(prompt, params, self._spec, self._checkpoint_defaults, self._pre_process)
        self._post_process.check(request)
        return request

    def add_request(self, request: OmniDiffusionRequest) -> str:
        """Queue a request that :meth:`validate` returned. Returns its id."""
        num_steps = request.sampling_params.num_inference_steps if self._is_stepped else 1
        assert num_steps is not None, "admission resolves num_inference_steps"
        self._tracked[request.request_id] = _Tracked(request=request, admitted=time.perf_counter())
        self._scheduler.add(ScheduledRequest(request=request, num_steps=num_steps))
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request before its next step. False if it is not in progress."""
        return self._scheduler.abort(request_id)

    def step(self, max_batch_size: int | None = None) -> EngineRound:
        """One round: each running request is prepared, takes one denoising step, or is decoded.

        ``max_batch_size`` takes the place of the configured one for this round.
        """
        if self._executor is None:
            raise EngineClosedError("the engine is closed; create a new one")
        command, aborted = self._scheduler.schedule(
            self.od_config.max_batch_size if max_batch_size is None else max_batch_size
        )
        outputs = [self._output(scheduled.request.request_id, "aborted") for scheduled in aborted]
        now = time.perf_counter()
        for request in command.prepare:
            self._tracked[request.request_id].scheduled = now
        if command.is_empty:
            return EngineRound(progress=[], outputs=outputs)
        try:
            result = self._executor.execute(command)
        except BaseException:
            self.discard_all()
            raise
        self._attention_backends = result.attention_backends
        self._accelerations = result.accelerations
        progress = []
        for scheduled in self._scheduler.update(command, result):
            request_id = scheduled.request.request_id
            self._tracked[request_id].num_steps_done = scheduled.step
            progress.append(StepProgress(request_id=request_id, step=scheduled.step, num_steps=scheduled.num_steps))
        outputs += [self._output(key, "failed", error=error) for key, error in result.errors.items()]
        outputs += [self._output(key, "completed", finished=finished) for key, finished in result.finished.items()]
        return EngineRound(progress=progress, outputs=outputs)

    def discard_all(self) -> None:
        """Forget every request, here and in the workers: after an interrupt, a later call must not meet leftovers."""
        self._scheduler.clear()
        leftovers = tuple(self._tracked)
        self._tracked.clear()
        if self._executor is not None and leftovers:
            self._executor.execute(WorkerCommand(release=leftovers))

    def close(self) -> None:
        """Drop the model and everything in progress. May be called twice."""
        self._scheduler.clear()
        self._tracked.clear()
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _output(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        finished: WorkerOutput | None = None,
        error: Exception | None = None,
    ) -> OmniRequestOutput:
        tracked = self._tracked.pop(request_id)
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
            request_id=request_id,
            prompt=request.prompt.get("prompt"),
            images=images,
            finished=reason == "completed",
            finish_reason=reason,
            metrics=metrics,
            receipt=self._receipt(request, finished) if reason == "completed" else None,
            error=error,
        )

    def _receipt(self, request: OmniDiffusionRequest, finished: WorkerOutput | None) -> Receipt:
        config, params = self.od_config, request.sampling_params
        seeds = request.seeds
        step_cache = None if finished is None else finished.step_cache
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


class _PostProcess:
    """A model's post-processing function, or none. One of the model guide's takes the output alone and returns PIL;
    one with a second parameter also takes the output type."""

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
        return list(output)


def _built(make_function: Callable[..., Any] | None, od_config: OmniDiffusionConfig) -> Callable[..., Any] | None:
    return None if make_function is None else make_function(od_config)


def _accelerations(config: OmniDiffusionConfig, step_cache: StepCacheUse | None) -> tuple[str, ...]:
    names = [name for name in ("vae_use_slicing", "vae_use_tiling") if getattr(config.memory, name)]
    if config.enable_prompt_embed_cache:
        names.append("enable_prompt_embed_cache")
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
