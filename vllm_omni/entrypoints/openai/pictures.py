"""A request for pictures, from its fields to its answer: what the routes of images and chat share."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from vllm_omni.entrypoints.live_requests import Watcher
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.media import base64_text, encode_picture, encode_preview
from vllm_omni.entrypoints.openai.protocol import PictureFields, RequestFields
from vllm_omni.entrypoints.openai.requests import PacedPreviews, progress_event
from vllm_omni.entrypoints.openai.server import EventStream, Server, placing_of, server_of, sse, unless_disconnected
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.media import opaque
from vllm_omni.outputs import OmniRequestOutput

# Pixels of a picture that is encoded in the event loop: it takes 2 ms, and another thread costs the engine's more.
_SMALL_PICTURE = 256 * 256


def prompt_of(body: PictureFields, images: Sequence[Any] = (), mask: Any = None) -> OmniPrompt:
    """The engine's prompt. Pictures are encoded files: the model's pre-processing checks and decodes them."""
    prompt: OmniPrompt = {"prompt": body.prompt}
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    if images:
        prompt["multi_modal_data"] = {"image": list(images)} | ({} if mask is None else {"mask": mask})
    return prompt


@contextmanager
def fields_as_sent(body: PictureFields, *, has_mask: bool = False) -> Iterator[None]:
    """Errors of the engine under the names that the client used."""
    try:
        yield
    except InvalidRequestError as error:
        raise as_sent(error, body, has_mask=has_mask) from error


def as_sent(error: InvalidRequestError, body: RequestFields, *, has_mask: bool = False) -> InvalidRequestError:
    names = {"num_outputs_per_prompt": "n", "multi_modal_data": "mask" if has_mask else "image"}
    if body.size is not None:
        names |= {"height": "size", "width": "size"}
    return InvalidRequestError(str(error), param=names.get(error.param, error.param))


async def answer(
    request: Request, body: PictureFields, event_name: str, images: Sequence[Any] = (), mask: Any = None
) -> Response:
    """Run the request, and answer it whole or as a stream. Raises what the engine raises, before any answer."""
    server = server_of(request)
    server.check_accepts()
    server.check_model(body.model)
    server.check_kind("image", "/v1/videos")
    server.check_pictures(len(images), "image", "as image to POST /v1/images/edits")
    with fields_as_sent(body, has_mask=mask is not None):
        params = body.sampling_params(body.n)
        prompt = prompt_of(body, images, mask)
        if body.stream:
            return await _stream(request, body, event_name, prompt, params)
        output = await unless_disconnected(
            request, server.omni.complete(prompt, params, **placing_of(request, body), kind="image")
        )
    if not output.finished:
        raise ApiError(409, f"{output.request_id} was cancelled", code="cancelled")
    content = await _whole(server, body, output)
    if body.response_format == "url":
        content["data"] = [await _stored(request, body, entry["b64_json"]) for entry in content["data"]]
    return JSONResponse(content)


async def _stored(request: Request, body: PictureFields, b64_json: str) -> dict[str, str]:
    name = await asyncio.to_thread(server_of(request).storage.put_file, base64.b64decode(b64_json), body.output_format)
    return {"url": str(request.url_for("stored_file", name=name))}


async def _whole(server: Server, body: PictureFields, output: OmniRequestOutput) -> dict[str, Any]:
    pictures = output.flat_images
    files = [await _file(picture, body) for picture in pictures]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64_text(file)} for file in files],
        **_form(body, pictures[0].size),
        **server.receipt(output),
    }


async def _file(picture: Image.Image, body: PictureFields) -> bytes:
    shown = opaque(picture) if body.background == "opaque" else picture
    arguments = shown, body.output_format, body.output_compression
    if picture.width * picture.height <= _SMALL_PICTURE:
        return encode_picture(*arguments)
    return await asyncio.to_thread(encode_picture, *arguments)


def _form(body: PictureFields, size: tuple[int, int]) -> dict[str, Any]:
    width, height = size
    return {"background": body.background, "output_format": body.output_format, "size": f"{width}x{height}"}


async def _stream(
    request: Request,
    body: PictureFields,
    event_name: str,
    prompt: OmniPrompt,
    params: OmniDiffusionSamplingParams,
) -> Response:
    omni = server_of(request).omni
    if body.partial_images and not omni.engine.has_previews:
        raise InvalidRequestError(
            f"partial_images={body.partial_images}: this model runs in one piece, or makes layers, and shows no partial"
            " pictures; use 0",
            param="partial_images",
        )
    if body.stream_progress:
        watcher = Watcher(previews=PacedPreviews() if omni.engine.has_quick_previews else frozenset())
    else:
        watcher = Watcher(
            progress=body.partial_images > 0,
            previews=lambda step, num_steps: step in partial_steps(num_steps, body.partial_images),
        )
    request_id = await omni.submit(prompt, params, watcher=watcher, **placing_of(request, body), kind="image")
    events = _events(server_of(request), body, event_name, watcher, request_id)
    return EventStream(events, on_end=lambda: omni.abort(request_id))


def partial_steps(num_steps: int, num_previews: int) -> set[int]:
    """The steps after which a preview is sent: evenly spaced, and none after the last step."""
    return {max(1, num_steps * (i + 1) // (num_previews + 1)) for i in range(num_previews)} - {num_steps}


async def _events(
    server: Server, body: PictureFields, event_name: str, watcher: Watcher, request_id: str
) -> AsyncIterator[str]:
    live = server.omni.live.find(request_id)
    assert live is not None, "the request was just queued"
    size = (live.width, live.height) if live.width is not None and live.height is not None else None
    num_partial = 0
    if body.stream_progress:
        yield await progress_event(server, live)
    async for event in watcher.events():
        if isinstance(event, OmniRequestOutput):
            async for text in _completed(server, body, event_name, event):
                yield text
        elif body.stream_progress:
            yield await progress_event(server, live, event)
        elif event.preview is not None:
            for index, preview in enumerate(event.preview):
                file = await asyncio.to_thread(encode_preview, preview, size, body.output_format)
                content = {
                    "type": f"{event_name}.partial_image",
                    "b64_json": base64_text(file),
                    "partial_image_index": num_partial,
                    "image_index": index,
                    "created_at": int(time.time()),
                    "quality": "auto",
                    **_form(body, size or preview.shape[1::-1]),
                }
                yield sse(content, content["type"])
            num_partial += 1


async def _completed(
    server: Server, body: PictureFields, event_name: str, output: OmniRequestOutput
) -> AsyncIterator[str]:
    """An event per picture, or one that says what went wrong."""
    if not output.finished:
        error: BaseException = output.error or ApiError(409, f"{output.request_id} was cancelled", code="cancelled")
        if isinstance(error, InvalidRequestError):
            error = as_sent(error, body)
        yield sse(as_api_error(error).body(), "error")
        return
    whole = await _whole(server, body, output)
    for index, entry in enumerate(whole.pop("data")):
        content = {"type": f"{event_name}.completed", **entry, "image_index": index, **whole}
        content |= {"created_at": content.pop("created"), "quality": "auto", "usage": None}
        yield sse(content, content["type"])
