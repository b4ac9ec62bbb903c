"""Video jobs: accepted once, run until they end, whatever happens to the process in between."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import threading
import time
from typing import Any

from vllm_omni.entrypoints.live_requests import Watcher
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.media import encode_video
from vllm_omni.entrypoints.openai.protocol import VideoFields
from vllm_omni.entrypoints.openai.server import Server
from vllm_omni.entrypoints.openai.storage import Job, JobState
from vllm_omni.errors import EngineFailureError, RankFailureError
from vllm_omni.inputs.data import OmniPrompt
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger(__name__)

# A job that takes the process down with it would do so for ever.
_MAX_STARTS = 3
_SECONDS_BETWEEN_SWEEPS = 300.0
_SECONDS_TO_LET_GO = 5.0


class VideoJobs:
    """The jobs of one server, each with a task in its event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._jobs: dict[str, Job] = {}  # in hand: from before the engine may begin one until its task ends
        self._changing = threading.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on with what a former process left."""
        self._server.omni.engine.begin_listeners.append(self._begin)
        for job in self._server.storage.unfinished_jobs():
            self._store(job, "queued")
            self._jobs[job.id] = job
            self._spawn(job, self._resume(job))
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self, timeout_s: float) -> None:
        """Give running jobs ``timeout_s`` to end. What is left stays in the storage and runs in the next process."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=max(0.0, timeout_s))
        cut_off = set(self._tasks)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        # The engine lets go of them before its next step. Until then their ids are in use, also for the next server.
        ends = time.monotonic() + _SECONDS_TO_LET_GO
        while cut_off & {live.request_id for live in self._server.omni.live.in_progress} and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        self._server.omni.engine.begin_listeners.remove(self._begin)

    async def create(self, body: VideoFields, picture: bytes | None, **placing: Any) -> Job:
        """Accept a job. Raises what ``AsyncOmni.submit`` raises; then there is no job."""
        storage = self._server.storage
        input_file = None if picture is None else await asyncio.to_thread(storage.put_file, picture, "input")
        job = Job(fields=body.model_dump(exclude_none=True, exclude_defaults=True), input_file=input_file)
        # Before it is queued: a job that was accepted must be found after a crash.
        await asyncio.to_thread(storage.add_job, job)
        self._jobs[job.id] = job
        try:
            watcher = await self._submit(job, body, picture, **placing)
        except BaseException:
            del self._jobs[job.id]
            storage.delete_job(job)
            raise
        self._spawn(job, self._follow(job, watcher))
        return job

    async def delete(self, job: Job) -> None:
        """End a job if it runs, and drop it and its file."""
        task = self._tasks.pop(job.id, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._server.omni.abort(job.id)
        await asyncio.to_thread(self._server.storage.delete_job, job)

    async def cancel(self, request_id: str) -> None:
        """Write at once that a client ended a job: the process may end before the engine comes to it."""
        job = self._jobs.get(request_id)
        if job is not None:
            await self._fail(job, _cancelled(job))

    def _spawn(self, job: Job, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._forget(job.id))

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._jobs.pop(job_id, None)

    async def _submit(self, job: Job, body: VideoFields, picture: bytes | None, **placing: Any) -> Watcher:
        omni = self._server.omni
        watcher = Watcher(progress=False)
        params = body.video_params(omni.engine)
        await omni.submit(
            video_prompt(body, picture), params, watcher=watcher, request_id=job.id, kind="video", **placing
        )
        return watcher

    async def _resume(self, job: Job) -> None:
        if job.num_starts >= _MAX_STARTS:
            text = f"the server or its workers ended {job.num_starts} times while this job ran; it is not tried again"
            await self._fail(job, ApiError(500, text, code="too_many_restarts"))
            return
        try:
            body = VideoFields.model_validate(job.fields)
            path = None if job.input_file is None else self._server.storage.file(job.input_file)
            picture = None if path is None else await asyncio.to_thread(path.read_bytes)
            deadline_s = None if body.deadline_s is None else job.created + body.deadline_s - time.time()
            placing = {"client": body.client, "priority": body.priority, "deadline_s": deadline_s}
            watcher = await self._submit(job, body, picture, **placing, must_take=True)
        except Exception as error:
            await self._fail(job, as_api_error(error))
            return
        await self._follow(job, watcher)

    async def _follow(self, job: Job, watcher: Watcher) -> None:
        try:
            output = await watcher.get()
            assert isinstance(output, OmniRequestOutput), "a watcher without progress gets the result alone"
            await self._end(job, output)
        except Exception as error:
            logger.exception("the job %s failed", job.id)
            await self._fail(job, as_api_error(error))
        finally:
            self._server.omni.abort(job.id)

    def _begin(self, request_id: str) -> None:
        """Count a start on the disk. The engine's thread calls it before work that may take the process down."""
        job = self._jobs.get(request_id)
        if job is None:
            return  # another kind of request
        try:
            self._store(job, "in_progress", num_starts=job.num_starts + 1)
        except (OSError, sqlite3.Error):
            logger.exception("the job %s begins, but its start could not be counted", job.id)

    async def _end(self, job: Job, output: OmniRequestOutput) -> None:
        if job.state == "failed" or (output.finish_reason == "aborted" and self._server.is_draining):
            return  # cancelled, or left for the next process
        if not output.finished:
            if isinstance(output.error, RankFailureError | EngineFailureError):
                # A failure of the whole engine also ends jobs that wait, and would do so for ever.
                num_starts = job.num_starts + (job.state == "queued")
                if num_starts < _MAX_STARTS:
                    logger.warning("the job %s starts again: %s", job.id, output.error)
                    if await asyncio.to_thread(self._store, job, "queued", num_starts=num_starts):
                        await self._resume(job)
                    return
            await self._fail(job, as_api_error(output.error or _cancelled(job)))
            return
        assert output.receipt is not None, "a finished request has a receipt"
        fps = output.receipt.fps
        assert fps is not None, "a video model resolves fps"
        content = await asyncio.to_thread(encode_video, output.images[0], fps)
        file = await asyncio.to_thread(self._server.storage.put_file, content, "mp4")
        ended = {"completed": int(time.time()), "file": file, "result": self._server.receipt(output)}
        await asyncio.to_thread(self._store, job, "completed", **ended)

    async def _fail(self, job: Job, error: ApiError) -> None:
        ended = {"completed": int(time.time()), "error": error.body()["error"]}
        await asyncio.to_thread(self._store, job, "failed", **ended)

    def _store(self, job: Job, state: JobState, **changes: Any) -> bool:
        """Change a job on the disk, then here. False for one that has ended: what was cancelled stays so.

        The engine's thread and those of the server take turns.
        """
        with self._changing:
            if job.completed is not None:
                return False
            changed = dataclasses.replace(job, state=state, **changes)
            self._server.storage.put_job(changed)
            vars(job).update(vars(changed))
            return True

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._server.storage.sweep)
            except (OSError, sqlite3.Error):
                logger.exception("old results could not be dropped")
            await asyncio.sleep(_SECONDS_BETWEEN_SWEEPS)


def _cancelled(job: Job) -> ApiError:
    return ApiError(409, f"{job.id} was cancelled", code="cancelled")


def video_prompt(body: VideoFields, picture: bytes | None) -> OmniPrompt:
    """The engine's prompt. The picture is an encoded file: the model's pre-processing checks and decodes it."""
    prompt: OmniPrompt = {"prompt": body.prompt}
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    if picture is not None:
        prompt["multi_modal_data"] = {"image": picture}
    return prompt
