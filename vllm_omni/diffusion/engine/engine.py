"""The engine: it admits requests, drives their steps, and turns what the workers return into results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.diffusion.data import TASKS, OmniDiffusionConfig, RequestSpec, SameAs
from vllm_omni.diffusion.engine.admission import Door, take_noise
from vllm_omni.diffusion.engine.executor import Executor, make_executor
from vllm_omni.diffusion.engine.memory_budget import MemoryBudget
from vllm_omni.diffusion.engine.results import Results, TrackedRequest
from vllm_omni.diffusion.engine.scheduler import ScheduledRequest, Scheduler
from vllm_omni.diffusion.latent_preview import LatentPreview
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerOutput
from vllm_omni.errors import EngineClosedError, EngineFailureError, InvalidRequestError, first_line, release_frames
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logger import init_logger
from vllm_omni.outputs import FinishReason, OmniRequestOutput, StepProgress

logger = init_logger(__name__)

# Whether a request's next step is to be shown: its id, the step, and the number of its steps.
NeedsPreview = Callable[[str, int, int], bool]


@dataclass(kw_only=True)
class EngineRound:
    """What one call of :meth:`Engine.step` brought about."""

    progress: list[StepProgress]
    outputs: list[OmniRequestOutput]
    seconds: float = 0.0  # of the workers


class Engine:
    """Serves one model. One thread calls :meth:`step`; requests come and are aborted from any thread.

    ``needs_preview`` is asked before each step of a request, by a server whose clients may watch. An engine that
    ``is_online`` learns how to batch, and serves the shortest request first unless the configuration says otherwise.
    """

    def __init__(
        self,
        od_config: OmniDiffusionConfig,
        on_load_progress: LoadProgress | None = None,
        needs_preview: NeedsPreview | None = None,
        *,
        is_online: bool = False,
    ) -> None:
        self.od_config = od_config
        model = resolve_diffusion_model(od_config.model_class_name)
        self._door = Door(od_config)
        self._is_stepped = self._door.is_stepped
        self._spec = self._door.spec
        self._results = Results(od_config, self._spec, model.post_process(od_config))
        limit = None if od_config.memory_budget_mb is None else od_config.memory_budget_mb * 2**20
        budget = MemoryBudget(limit, is_cautious=is_online)
        policy = od_config.scheduling_policy or ("shortest" if is_online else "fcfs")
        replicas = od_config.parallel_config.data_parallel_size
        self._scheduler = Scheduler(
            od_config.max_num_seqs, policy, budget, measured_batches=is_online, num_replicas=replicas
        )
        self._tracked: dict[str, TrackedRequest] = {}
        self.begin_listeners: list[Callable[[str], object]] = []  # told a request's id before any work for it
        self._executor: Executor | None = make_executor(od_config, on_load_progress)
        # By a map they cost next to nothing. Without one the decoder makes those of pictures, each at its full cost.
        self.has_quick_previews = self._is_stepped and LatentPreview.load(od_config.model) is not None
        self.has_previews = self.has_quick_previews or (self._is_stepped and self._door.decodes_pictures)
        self._needs_preview = needs_preview if self.has_previews else None

    @property
    def is_alive(self) -> bool:
        """False once it is closed, or once its ranks have failed so often that they are not started again."""
        return self._executor is not None and self._executor.is_alive

    @property
    def num_ready(self) -> int:
        """Replicas of the model that begin a request at once; 0 while all start again, for which requests wait."""
        return 0 if self._executor is None else self._executor.num_ready

    @property
    def has_requests(self) -> bool:
        return self._scheduler.has_requests

    @property
    def num_waiting(self) -> int:
        """Requests that no worker has begun."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that workers hold."""
        return self._scheduler.num_running

    @property
    def spec(self) -> RequestSpec | None:
        """What requests the model takes, or None if it does not say."""
        return self._spec

    @property
    def takes_images(self) -> bool:
        """Whether a prompt may hold pictures."""
        return self._spec is not None and "multi_modal_data" in self._spec.prompt_keys

    @property
    def needs_images(self) -> bool:
        """Whether a prompt must hold pictures."""
        return self._spec is not None and self.takes_images and all(TASKS[task] for task in self._spec.tasks)

    @property
    def request_defaults(self) -> dict[str, Any]:
        """The parameters that the model takes, with the value of an absent one where it does not follow from others."""
        defaults = {} if self._spec is None else dict(self._spec.defaults)
        own = {name: value for name, value in defaults.items() if not isinstance(value, SameAs)}
        return {**own, **self._door.checkpoint_defaults}

    def num_frames_of(self, seconds: float, fps: float | None) -> int:
        """The number of frames that the model can make which comes nearest to ``seconds``; ``fps`` None is its own."""
        assert self._spec is not None, "a video model tells its requests"
        rate = self.request_defaults["fps"] if fps is None else fps
        factor = self._spec.temporal_factor
        return max(1, round((seconds * rate - 1) / factor) * factor + 1)

    def seconds_left(self) -> dict[str, float]:
        """Estimated seconds until each request in hand is done, by id, the first to be served first."""
        return self._scheduler.seconds_left()

    @property
    def seconds_of_work(self) -> float:
        """Estimated seconds until every request in hand is done."""
        return max(self.seconds_left().values(), default=0.0)

    @property
    def output_kind(self) -> Literal["image", "video"]:
        return self._door.output_kind

    def validate(self, prompt: Any, params: OmniDiffusionSamplingParams) -> OmniDiffusionRequest:
        """A request with all defaults resolved, pre-processed. Raises ``InvalidRequestError``; queues nothing."""
        if self._executor is None:
            raise EngineClosedError("the engine is closed; create a new one")
        request = self._door.admit(prompt, params)
        self._results.check(request)
        self._check_fits(request)
        return request

    def add_request(
        self, request: OmniDiffusionRequest, *, priority: int = 0, deadline_s: float | None = None, client: str = ""
    ) -> str:
        """Queue a request that :meth:`validate` returned. Returns its id.

        A lower ``priority`` is served earlier. ``deadline_s`` is when it should be done, in seconds from now: close to
        it the request goes before others. ``client`` is for whom it is: the policy ``fair`` shares among them.
        """
        take_noise(request.sampling_params)
        scheduled = self._scheduled(request)
        scheduled.priority, scheduled.client = priority, client
        scheduled.deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self._tracked[request.request_id] = TrackedRequest(request=request, admitted=time.perf_counter())
        self._scheduler.add(scheduled)
        return request.request_id

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change the priority of a request. False if it is not in progress."""
        return self._scheduler.set_priority(request_id, priority)

    def abort(self, request_id: str) -> bool:
        """End a request before its next step. False if it is not in progress."""
        return self._scheduler.abort(request_id)

    def step(self, max_batch_size: int | None = None) -> EngineRound:
        """One round: each running request is prepared, takes one denoising step, or is decoded.

        ``max_batch_size`` takes the place of the configured one for this round.
        """
        if self._executor is None:
            raise EngineClosedError("the engine is closed; create a new one")
        most_rows = self.od_config.max_batch_size if max_batch_size is None else max_batch_size
        command, aborted = self._scheduler.schedule(most_rows)
        outputs = [self._output(scheduled.request.request_id, "aborted") for scheduled in aborted]
        for listener in self.begin_listeners:
            for request in command.prepare:
                listener(request.request_id)
        started = time.perf_counter()
        for request in command.prepare:
            self._tracked[request.request_id].scheduled = started
        if command.is_empty:
            return EngineRound(progress=[], outputs=outputs)
        try:
            result = self._executor.execute(self._with_previews(command))
        except Exception as error:
            logger.exception("a round of the workers failed")
            return EngineRound(progress=[], outputs=outputs + self._fail_running(error))
        except BaseException:
            self.discard_all()
            raise
        seconds = time.perf_counter() - started
        self._results.update(result)
        progress = []
        for scheduled in self._scheduler.update(command, result):
            request_id = scheduled.request.request_id
            self._tracked[request_id].num_steps_done = scheduled.step
            preview = result.previews.get(request_id)
            progress.append(
                StepProgress(request_id=request_id, step=scheduled.step, num_steps=scheduled.num_steps, preview=preview)
            )
        outputs += [self._output(key, "failed", error=error) for key, error in result.errors.items()]
        outputs += [self._output(key, "completed", finished=finished) for key, finished in result.finished.items()]
        return EngineRound(progress=progress, outputs=outputs, seconds=seconds)

    def try_step(self, requests: Sequence[OmniDiffusionRequest]) -> list[Exception]:
        """Take one step of requests that are not queued, in no compiled code. Returns what they failed with."""
        assert self._executor is not None, "a trial is before the first request"
        ids, most_rows = tuple(request.request_id for request in requests), self.od_config.max_batch_size
        trial = WorkerCommand(prepare=tuple(requests), step=ids, max_batch_size=most_rows, is_trial=True)
        result = self._executor.execute(trial)
        self._executor.execute(WorkerCommand(release=ids))
        return list(result.errors.values())

    def _with_previews(self, command: WorkerCommand) -> WorkerCommand:
        needs = self._needs_preview
        if needs is None:
            return command
        stepping = [(key, self._scheduler.find(key)) for key in command.step]
        shown = [key for key, item in stepping if item is not None and needs(key, item.step + 1, item.num_steps)]
        return dataclasses.replace(command, preview=tuple(shown))

    def _scheduled(self, request: OmniDiffusionRequest) -> ScheduledRequest:
        params = request.sampling_params
        num_steps = params.num_inference_steps if self._is_stepped else 1
        assert num_steps is not None, "admission resolves num_inference_steps"
        names = ("true_cfg_scale",) if self._spec is None else self._spec.cfg_parameters
        is_guided = any((getattr(params, name) or 0) > 1 for name in names)
        return ScheduledRequest(
            request=request,
            num_steps=num_steps,
            num_rows=request.num_outputs * (1 + is_guided),
            can_share=self._is_stepped,
        )

    def _check_fits(self, request: OmniDiffusionRequest) -> None:
        """Raises ``InvalidRequestError`` for one that needs more memory than there is even if it runs alone."""
        shortage = self._scheduler.shortage(self._scheduled(request))
        if shortage is not None:
            needed, available = (num_bytes / 2**20 for num_bytes in shortage)
            raise InvalidRequestError(
                f"the request needs about {needed:,.0f} MB, by what others of its kind took, and the device has"
                f" {available:,.0f} MB for requests; ask for a smaller size or fewer outputs",
                param="height",
            )

    def _fail_running(self, cause: Exception) -> list[OmniRequestOutput]:
        """The results of the requests that a failure of the workers took along. Those that wait go on."""
        error = EngineFailureError(f"the workers failed ({first_line(cause)}); send the request again")
        error.__cause__ = cause
        release_frames(cause)
        return [
            self._output(scheduled.request.request_id, "failed", error=error)
            for scheduled in self._scheduler.fail_running()
        ]

    def discard_all(self) -> list[str]:
        """Forget every request, here and in the workers: after an interrupt, a later call must not meet leftovers.

        Returns their ids.
        """
        discarded = self._scheduler.clear()
        for request_id in discarded:
            self._tracked.pop(request_id, None)
        if self._executor is not None and discarded:
            try:
                self._executor.execute(WorkerCommand(release=tuple(discarded)))
            except Exception:
                logger.exception("the workers could not release requests")
        return discarded

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
        return self._results.output(tracked, reason, finished=finished, error=error)
