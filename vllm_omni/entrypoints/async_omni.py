"""Online generation: ``async for event in AsyncOmni(model).generate(prompt)``."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from vllm_omni.diffusion.distributed.layout import check_layout
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.engine.engine import Engine, EngineRound
from vllm_omni.diffusion.engine.warm_up import warm_up
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.entrypoints.live_requests import LiveRequest, LiveRequests, RequestEvent, Watcher
from vllm_omni.entrypoints.omni import choose_model
from vllm_omni.errors import (
    EngineClosedError,
    EngineFailureError,
    FeatureNotAvailableError,
    GenerationError,
    InvalidRequestError,
    QueueFullError,
    first_line,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, PromptInput
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger(__name__)

_NUM_DECODERS = 2


class AsyncOmni:
    """A diffusion model behind an engine that runs in a thread of its own. Requests join and leave between two steps.

    ``model``, ``task`` and ``options`` are those of :class:`~vllm_omni.entrypoints.omni.Omni`. At most ``max_queue``
    requests wait; a further one is refused with ``QueueFullError``. Creating one blocks until the model is loaded. Its
    methods may be called from any thread and any event loop.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        task: str | None = None,
        max_queue: int = 256,
        on_load_progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        if isinstance(max_queue, bool) or max_queue < 1:
            raise InvalidRequestError(f"max_queue={max_queue!r} must be at least 1", param="max_queue")
        self.live = LiveRequests()
        self.od_config = configure(choose_model(model, task), options, task)
        self.listeners: list[Callable[[EngineRound], object]] = []  # the engine's thread tells them of each round
        self._max_queue = max_queue
        if check_layout(self.od_config).is_in_torchrun:
            raise FeatureNotAvailableError(
                "torchrun: its processes must ask for the same pictures in the same order, which clients do not; start"
                " it without torchrun, and it starts its ranks itself"
            )
        self._closed = False
        self._wake = threading.Condition()
        # A small file can unpack to MAX_PIXELS: so many of them are in memory at a time and no more.
        self._decoders = ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="vllm-omni-pictures")
        loading: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(loading, on_load_progress), name="vllm-omni-engine", daemon=True
        )
        self._thread.start()
        self.engine = loading.result()

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        previews: Collection[int] | Callable[[int, int], bool] = frozenset(),
        **placing: Any,
    ) -> AsyncIterator[RequestEvent]:
        """The events of one request: ``StepProgress`` after each step, and its ``OmniRequestOutput`` at the end.

        ``previews`` are the steps whose events carry a preview, or a function of the step and the number of steps;
        a video model without a map of its latents has none, which is an error. ``placing`` are the keywords of
        :meth:`submit`. Leaving the iteration aborts the request. Raises what :meth:`submit` raises, and
        ``GenerationError`` if the request fails while it runs.
        """
        if previews and not self.engine.has_previews:
            raise InvalidRequestError(
                "this model has no map from latents to colours (latent_preview.json) and no decoder of single pictures,"
                " so it shows no previews; make a map with tools/fit_preview.py, or ask for none",
                param="previews",
            )
        watcher = Watcher(previews=previews)
        request_id = await self.submit(prompt, sampling_params, watcher=watcher, **placing)
        try:
            async for event in watcher.events():
                if isinstance(event, OmniRequestOutput):
                    raise_if_failed(event)
                yield event
        finally:
            self.abort(request_id)

    async def complete(
        self, prompt: PromptInput, sampling_params: OmniDiffusionSamplingParams | None = None, **placing: Any
    ) -> OmniRequestOutput:
        """The result of one request. Cancelling the call aborts it. Raises what :meth:`generate` raises."""
        watcher = Watcher(progress=False)
        request_id = await self.submit(prompt, sampling_params, watcher=watcher, **placing)
        try:
            output = await watcher.get()
        finally:
            self.abort(request_id)
        assert isinstance(output, OmniRequestOutput), "a watcher without progress gets the result alone"
        raise_if_failed(output)
        return output

    async def submit(
        self,
        prompt: PromptInput,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        watcher: Watcher | None = None,
        request_id: str | None = None,
        kind: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        client: str = "",
        must_take: bool = False,
    ) -> str:
        """Queue a request and return its id. It runs whether or not someone watches.

        ``request_id`` must not be in use; one is made if it is absent. ``kind`` is shown to who looks at the queue.
        With ``must_take`` it is queued however many wait. The others are those of :meth:`Engine.add_request`. Raises
        ``InvalidRequestError``, ``QueueFullError`` or ``EngineClosedError``.
        """
        params = OmniDiffusionSamplingParams() if sampling_params is None else sampling_params
        self._check_open()
        if isinstance(prompt, dict) and prompt.get("multi_modal_data"):
            # Pictures are decoded and scaled: not in the event loop, where everybody would wait for it.
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._decoders, self.engine.validate, prompt, params)
        else:
            request = self.engine.validate(prompt, params)  # a tenth of a millisecond
        with self._wake:
            self._check_open()
            if request_id is not None:
                self._check_unused(request_id)
                request.request_id = request_id
            if not must_take:
                self._check_queue()
            live = _live_request(request, kind or self.output_kind)
            live.priority = priority
            self.live.add(live, watcher)
            self.engine.add_request(request, priority=priority, deadline_s=deadline_s, client=client)
            self._wake.notify()
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request before its next step. False if it is not in progress."""
        aborted = self.engine.abort(request_id)
        if aborted:
            with self._wake:
                self._wake.notify()
        return aborted

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change the priority of a request. False if it is not in progress."""
        changed = self.engine.set_priority(request_id, priority)
        live = self.live.find(request_id)
        if changed and live is not None:
            live.priority = priority
        return changed

    @property
    def output_kind(self) -> Literal["image", "video"]:
        """What each entry of an output's ``images`` is: a picture (or a list of its layers), or a video's frames."""
        return self.engine.output_kind

    @property
    def is_running(self) -> bool:
        """Whether requests are served: not once it is closed, or its workers have failed for good."""
        return self._thread.is_alive() and not self._closed and self.engine.is_alive

    def close(self) -> None:
        """Abort everything and free the model. May be called twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._decoders.shutdown(cancel_futures=True)
        self._thread.join()
        self.engine.close()

    def __enter__(self) -> AsyncOmni:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this AsyncOmni is closed; create a new one")

    def _check_unused(self, request_id: str) -> None:
        found = self.live.find(request_id)
        if found is not None and not found.is_finished:
            raise InvalidRequestError(f"request_id={request_id!r} is in use; give another one", param="request_id")

    def _check_queue(self) -> None:
        num_waiting = self.engine.num_waiting
        if num_waiting >= self._max_queue:
            # One that waits leaves its place once the first of all is done.
            retry_after_s = min(self.engine.seconds_left().values(), default=0.0)
            raise QueueFullError(
                f"the queue is full ({num_waiting} of {self._max_queue}); try again in"
                f" {max(1, math.ceil(retry_after_s))} s",
                retry_after_s=retry_after_s,
            )

    def _run(self, loading: Future[Engine], on_load_progress: LoadProgress | None) -> None:
        """The engine's thread."""
        # It also loads: each thread that computes gets OpenMP workers of its own, and once there are more of them than
        # cores, OpenMP no longer spins at its barriers but sleeps, which took a third of the throughput.
        try:
            engine = Engine(self.od_config, on_load_progress, self.live.needs_preview, is_online=True)
            try:
                warm_up(engine, is_server=True)
            except BaseException:
                engine.close()
                raise
        except BaseException as error:
            loading.set_exception(error)
            return
        loading.set_result(engine)
        self._serve(engine)

    def _serve(self, engine: Engine) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or engine.has_requests)
                if self._closed:
                    break
            try:
                completed = engine.step()
            except Exception as error:
                logger.exception("the engine failed")
                self._end_all("failed", error)
            else:
                self._tell(completed)
        self._end_all("aborted", None)

    def _tell(self, completed: EngineRound) -> None:
        for listener in self.listeners:
            try:
                listener(completed)
            except Exception:
                logger.exception("a listener failed; the engine goes on")
        self.live.tell([*completed.progress, *completed.outputs])

    def _end_all(self, reason: Literal["failed", "aborted"], cause: Exception | None) -> None:
        """After a failure that no request caused: all get an error, and the engine goes on with later ones."""
        error = None
        if cause is not None:
            error = EngineFailureError(f"the engine failed ({first_line(cause)}); send the request again")
        outputs = [
            OmniRequestOutput(request_id=key, prompt=None, finished=False, finish_reason=reason, error=error)
            for key in self.engine.discard_all()
        ]
        self._tell(EngineRound(progress=[], outputs=outputs))


def raise_if_failed(output: OmniRequestOutput) -> None:
    """Raises ``InvalidRequestError`` for what only the device could tell, ``GenerationError`` for other failures."""
    if output.error is None:
        return
    if isinstance(output.error, InvalidRequestError):
        raise output.error
    raise GenerationError(f"{output.request_id} failed: {output.error}", outputs=[output]) from output.error


def _live_request(request: OmniDiffusionRequest, kind: str) -> LiveRequest:
    params = request.sampling_params
    return LiveRequest(
        request_id=request.request_id,
        kind=kind,
        prompt=request.prompt.get("prompt"),
        width=params.width,
        height=params.height,
        num_frames=params.num_frames,
        num_steps=1 if params.num_inference_steps is None else params.num_inference_steps,
    )
