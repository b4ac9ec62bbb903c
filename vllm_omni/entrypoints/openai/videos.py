"""``/v1/videos``: videos as jobs, and one that is waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

from vllm_omni.entrypoints.openai.errors import ApiError, validation_error
from vllm_omni.entrypoints.openai.forms import from_form, is_form, read_form
from vllm_omni.entrypoints.openai.jobs import VideoJobs, video_prompt
from vllm_omni.entrypoints.openai.media import encode_video
from vllm_omni.entrypoints.openai.protocol import VideoFields
from vllm_omni.entrypoints.openai.server import Server, placing_of, server_of, unless_disconnected
from vllm_omni.entrypoints.openai.storage import Job
from vllm_omni.errors import InvalidRequestError

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_REFERENCE = "input_reference"
_REFERENCE_ADDRESS = f"{_REFERENCE}[image_url]"


def _body_schema() -> dict[str, Any]:
    schema = VideoFields.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs")
    plain = {**schema, "properties": schema["properties"] | {_REFERENCE: definitions["PictureReference"]}}
    file = {"type": "string", "format": "binary", "description": "the picture that it starts from"}
    form = {**schema, "properties": schema["properties"] | {_REFERENCE: file}}
    content = {"application/json": {"schema": plain}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("", openapi_extra=_body_schema())
async def create_video(request: Request) -> dict[str, Any]:
    """Accept a video as a job, as JSON or as a form. It runs whether or not its client stays."""
    server = server_of(request)
    body, picture = await _read(request)
    with _fields_as_sent(body):
        placing = {name: value for name, value in placing_of(request, body).items() if name != "request_id"}
        job = await _jobs(request).create(body, picture, **placing)
    return describe(server, job)


@router.get("")
async def list_videos(
    request: Request,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Jobs in the order in which they came, page by page."""
    server = server_of(request)
    if after is not None:
        await _found(server, after, param="after")
    jobs, has_more = await asyncio.to_thread(
        server.storage.jobs, after=after, limit=limit, newest_first=order == "desc"
    )
    data = [describe(server, job) for job in jobs]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": has_more, "first_id": ends[0], "last_id": ends[1]}


@router.post("/sync", openapi_extra=_body_schema(), response_class=Response)
async def create_video_and_wait(request: Request) -> Response:
    """A video in the answer itself, as mp4; its receipt and timings are JSON in the header X-Receipt."""
    server = server_of(request)
    body, picture = await _read(request)
    with _fields_as_sent(body):
        params = body.video_params(server.omni.engine)
        output = await unless_disconnected(
            request,
            server.omni.complete(video_prompt(body, picture), params, **placing_of(request, body), kind="video"),
        )
    if not output.finished:
        raise ApiError(409, f"{output.request_id} was cancelled", code="cancelled")
    assert output.receipt is not None, "a finished request has a receipt"
    assert output.receipt.fps is not None, "a video model resolves fps"
    content = await asyncio.to_thread(encode_video, output.images[0], output.receipt.fps)
    return Response(content, media_type="video/mp4", headers={"X-Receipt": json.dumps(server.receipt(output))})


@router.get("/{video_id}")
async def retrieve_video(video_id: str, request: Request) -> dict[str, Any]:
    """A job, and how far it is."""
    server = server_of(request)
    return describe(server, await _found(server, video_id))


@router.get("/{video_id}/content", response_class=FileResponse)
async def download_video(video_id: str, request: Request, variant: Literal["video"] = "video") -> Response:
    """The mp4 of a completed job."""
    server = server_of(request)
    job = await _found(server, video_id)
    path = None if job.file is None else await asyncio.to_thread(server.storage.file, job.file)
    if job.state == "completed" and path is None:
        raise ApiError(404, f"the file of {video_id} has expired", code="video_expired", param="video_id")
    if path is None:
        raise ApiError(409, f"{video_id} is {job.state}, not completed", code="video_not_ready", param="video_id")
    return FileResponse(path, media_type="video/mp4", headers={"X-Receipt": json.dumps(job.result)})


@router.delete("/{video_id}")
async def delete_video(video_id: str, request: Request) -> dict[str, Any]:
    """End a job if it runs, and drop it."""
    job = await _found(server_of(request), video_id)
    await _jobs(request).delete(job)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


def describe(server: Server, job: Job) -> dict[str, Any]:
    """A job in OpenAI's form, with the receipt and the timings once it is done."""
    live = server.omni.live.find(job.id)
    params = {} if live is None else {"width": live.width, "height": live.height, "num_frames": live.num_frames}
    params |= job.result.get("receipt", {})
    progress = 100 if job.state == "completed" else 0
    if live is not None and job.state == "in_progress":
        progress = min(99, round(100 * live.step / live.num_steps))
    fps = params.get("fps") or job.fields.get("fps") or server.omni.engine.request_defaults.get("fps")
    frames = params.get("num_frames")
    return {
        "id": job.id,
        "object": "video",
        "model": server.model_name,
        "status": job.state,
        "progress": progress,
        "created_at": job.created,
        "completed_at": job.completed,
        "expires_at": server.storage.expires(job),
        "prompt": job.fields.get("prompt"),
        "size": f"{params['width']}x{params['height']}" if params.get("width") else job.fields.get("size"),
        "seconds": f"{frames / fps:g}" if frames and fps else job.fields.get("seconds"),
        "eta_s": None if live is None or live.is_finished else server.omni.engine.seconds_left().get(job.id),
        "error": job.error,
        "receipt": job.result.get("receipt"),
        "timings": job.result.get("timings"),
    }


async def _read(request: Request) -> tuple[VideoFields, bytes | None]:
    """The fields and the picture of a body in either form."""
    server = server_of(request)
    server.check_accepts()
    if is_form(request):
        files, fields = await read_form(request, (_REFERENCE,))
        addresses = [text for name, text in fields if name == _REFERENCE_ADDRESS]
        body = from_form(VideoFields, [field for field in fields if field[0] != _REFERENCE_ADDRESS])
    else:
        files, addresses = {_REFERENCE: []}, []
        body = await _from_json(request)
    if body.input_reference is not None:
        addresses.append(body.input_reference.image_url)
        body.input_reference = None
    if len(files[_REFERENCE]) + len(addresses) > 1:
        text = f"{_REFERENCE} is given twice; a video starts from one picture"
        raise ApiError(400, text, code="invalid_value", param=_REFERENCE)
    server.check_model(body.model)
    server.check_kind("video", "/v1/images/generations")
    server.check_pictures(len(files[_REFERENCE]) + len(addresses), _REFERENCE, f"as {_REFERENCE}")
    pictures = files[_REFERENCE]
    if addresses:
        pictures = await unless_disconnected(request, server.media.fetch(addresses, _REFERENCE))
    return body, pictures[0] if pictures else None


async def _from_json(request: Request) -> VideoFields:
    if "json" not in request.headers.get("content-type", ""):
        raise validation_error([{"type": "model_type", "loc": ("body",)}])
    try:
        return VideoFields.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_error(list(error.errors())) from error


@contextmanager
def _fields_as_sent(body: VideoFields) -> Iterator[None]:
    """Errors of the engine under the names that the client used."""
    try:
        yield
    except InvalidRequestError as error:
        names = {"multi_modal_data": _REFERENCE, "image": _REFERENCE}
        if body.size is not None:
            names |= {"height": "size", "width": "size"}
        if body.seconds is not None:
            names["num_frames"] = "seconds"
        raise InvalidRequestError(str(error), param=names.get(error.param, error.param)) from error


def _jobs(request: Request) -> VideoJobs:
    jobs: VideoJobs = request.app.state.jobs
    return jobs


async def _found(server: Server, video_id: str, param: str = "video_id") -> Job:
    job = await asyncio.to_thread(server.storage.job, video_id)
    if job is None:
        raise ApiError(404, f"there is no video {video_id!r}", code="video_not_found", param=param)
    return job
