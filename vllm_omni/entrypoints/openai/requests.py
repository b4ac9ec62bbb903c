"""``/v1/requests``: what is in hand, how far it is, and how to end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from vllm_omni.entrypoints.live_requests import LiveRequest, RequestEvent, Watcher
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.jobs import VideoJobs
from vllm_omni.entrypoints.openai.media import data_url, encode_preview
from vllm_omni.entrypoints.openai.protocol import StrictModel
from vllm_omni.entrypoints.openai.server import EventStream, Server, server_of, sse
from vllm_omni.outputs import StepProgress

router = APIRouter(prefix="/v1/requests", tags=["requests"])

_SECONDS_BETWEEN_PREVIEWS = 0.25
_SECONDS_BETWEEN_SIGNS_OF_LIFE = 15.0


@router.get("")
async def list_requests(request: Request) -> dict[str, Any]:
    """Requests in progress, and the last finished ones, in the order in which they came."""
    omni = server_of(request).omni
    seconds_left = omni.engine.seconds_left()
    return {"object": "list", "data": [describe(live, seconds_left) for live in omni.live.all()]}


@router.get("/{request_id}")
async def retrieve_request(request_id: str, request: Request) -> dict[str, Any]:
    """One request by its id."""
    server = server_of(request)
    return describe(_found(server, request_id), server.omni.engine.seconds_left())


@router.get("/{request_id}/events")
async def watch_request(request_id: str, request: Request, preview: bool = True) -> Response:
    """Progress and previews of a request as server-sent events, until it ends."""
    server = server_of(request)
    live = _found(server, request_id)
    watcher = Watcher(previews=PacedPreviews() if preview and server.omni.engine.has_quick_previews else frozenset())
    is_watched = server.omni.live.watch(request_id, watcher)
    events = _events(server, live, watcher if is_watched else None)
    return EventStream(events, on_end=lambda: server.omni.live.unwatch(request_id, watcher))


@router.delete("/{request_id}")
async def cancel_request(request_id: str, request: Request) -> dict[str, Any]:
    """End a request before its next step. It is told as it is then; its own client hears of it in its answer."""
    server = server_of(request)
    live = _found(server, request_id)
    if not server.omni.abort(request_id):
        raise _ended(live)
    jobs: VideoJobs = request.app.state.jobs
    await jobs.cancel(request_id)
    return {"id": request_id, "object": "request.cancelled", "cancelled": True}


class PriorityFields(StrictModel):
    """A new place in the queue."""

    priority: int = Field(ge=-1000, le=1000, description="a lower number is served earlier")


@router.post("/{request_id}/priority")
async def change_priority(request_id: str, body: PriorityFields, request: Request) -> dict[str, Any]:
    """Serve a request earlier or later than others."""
    server = server_of(request)
    live = _found(server, request_id)
    if not server.omni.set_priority(request_id, body.priority):
        raise _ended(live)
    return describe(live, server.omni.engine.seconds_left())


def _ended(live: LiveRequest) -> ApiError:
    return ApiError(409, f"{live.request_id} has ended ({live.state})", code="request_finished", param="request_id")


def describe(live: LiveRequest, seconds_left: Mapping[str, float]) -> dict[str, Any]:
    """A request without its outputs."""
    return {
        "id": live.request_id,
        "object": "request",
        "kind": live.kind,
        "state": live.state,
        "prompt": live.prompt,
        "size": None if live.width is None else f"{live.width}x{live.height}",
        "num_frames": live.num_frames,
        "step": live.step,
        "num_steps": live.num_steps,
        "progress": live.step / live.num_steps,
        "eta_s": seconds_left.get(live.request_id),
        "priority": live.priority,
        "created_at": live.created,
        "finished_at": live.finished,
        "error": None if live.error is None else as_api_error(live.error, log=False).body()["error"],
    }


class PacedPreviews:
    """A preview now and then, however fast the steps are."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, step: int, num_steps: int) -> bool:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_PREVIEWS:
            return False
        self._last = now
        return True


async def _events(server: Server, live: LiveRequest, watcher: Watcher | None) -> AsyncIterator[str]:
    """``progress`` after steps, and a last event named by how the request ended."""
    yield await progress_event(server, live)
    while watcher is not None and not live.is_finished:
        try:
            event: RequestEvent = await asyncio.wait_for(watcher.get(), _SECONDS_BETWEEN_SIGNS_OF_LIFE)
        except asyncio.TimeoutError:
            yield ": still here\n\n"
            continue
        if isinstance(event, StepProgress):
            yield await progress_event(server, live, event)
    yield sse(describe(live, {}), live.state)


async def progress_event(server: Server, live: LiveRequest, step: StepProgress | None = None) -> str:
    """How far a request is, with the preview if the step that it took has one."""
    content = describe(live, server.omni.engine.seconds_left())
    if step is not None and step.preview is not None:
        file = await asyncio.to_thread(encode_preview, step.preview[0], None, "jpeg")
        content["preview"] = data_url(file, "jpeg")
    return sse(content, "progress")


def _found(server: Server, request_id: str) -> LiveRequest:
    live = server.omni.live.find(request_id)
    if live is None:
        raise ApiError(404, f"there is no request {request_id!r}", code="request_not_found", param="request_id")
    return live
