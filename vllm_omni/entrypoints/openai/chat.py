"""``/v1/chat/completions``: a message of text and pictures is answered by pictures, or by a video."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Union

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Field, Tag, field_validator

from vllm_omni.entrypoints.live_requests import Watcher
from vllm_omni.entrypoints.openai.errors import ApiError, as_api_error
from vllm_omni.entrypoints.openai.media import base64_text, data_url, encode_picture, encode_video
from vllm_omni.entrypoints.openai.pictures import as_sent
from vllm_omni.entrypoints.openai.protocol import AtMost, ImageFormat, RequestFields, StrictModel
from vllm_omni.entrypoints.openai.server import EventStream, Server, placing_of, server_of, sse, unless_disconnected
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.outputs import OmniRequestOutput

router = APIRouter(prefix="/v1/chat", tags=["chat"])

_MAX_PARTS = 64
_MAX_MODALITIES = 8


class TextPart(StrictModel):
    """A text within a message."""

    type: Literal["text"]
    text: str


class PictureAddress(StrictModel):
    """Where a picture is."""

    url: str = Field(description="data:image/png;base64,... or, from a domain that is allowed, https://...")
    detail: Literal["auto"] = "auto"


class PicturePart(StrictModel):
    """A picture within a message."""

    type: Literal["image_url"]
    image_url: PictureAddress


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


def _content_tag(content: Any) -> str | None:
    return "<str>" if isinstance(content, str) else "<list>" if isinstance(content, list) else None


# Each of these is checked as what it says it is, so that an error is one, and of that. validation_error knows the tags.
_Part = Annotated[
    Union[Annotated[TextPart, Tag("<text>")], Annotated[PicturePart, Tag("<image_url>")]],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message="a part must be an object with the type 'text' or 'image_url'",
    ),
]
_Content = Annotated[
    Union[
        Annotated[str, Tag("<str>")], Annotated[list[_Part], AtMost(_MAX_PARTS, "messages.0.content"), Tag("<list>")]
    ],
    Discriminator(
        _content_tag,
        custom_error_type="content_type",
        custom_error_message="it must be a text, or a list of parts of the type 'text' or 'image_url'",
    ),
]


class Message(StrictModel):
    """What the user says."""

    role: Literal["user"] = Field(description="a diffusion model remembers nothing: one message of the user is all")
    content: _Content


class ChatFields(RequestFields):
    """What a chat request may have."""

    messages: list[Message] = Field(
        description="one message of the user", json_schema_extra={"minItems": 1, "maxItems": 1}
    )
    n: int | None = Field(None, ge=1, le=16, description="number of outputs, all in one answer")
    num_outputs_per_prompt: int | None = Field(None, ge=1, le=16, description="as n")
    modalities: Annotated[list[Literal["image", "video"]], AtMost(_MAX_MODALITIES)] | None = Field(
        None, description="what is expected in the answer"
    )
    output_format: ImageFormat = Field("png", description="file format of pictures")
    stream: bool = Field(False, description="server-sent events")

    @field_validator("messages", mode="before")
    @classmethod
    def _check_number(cls, messages: Any) -> Any:
        if isinstance(messages, list) and len(messages) != 1:
            raise InvalidRequestError(
                f"messages holds {len(messages)} messages; a diffusion model remembers nothing, so send one of the user"
                " with all texts and pictures",
                param="messages",
            )
        return messages

    @property
    def num_outputs(self) -> int | None:
        """Raises ``InvalidRequestError`` for two numbers."""
        if self.n is not None and self.num_outputs_per_prompt is not None:
            raise InvalidRequestError("n and num_outputs_per_prompt are one thing; give one of them", param="n")
        return self.num_outputs_per_prompt if self.n is None else self.n


@router.post("/completions")
async def complete_chat(body: ChatFields, request: Request) -> Response:
    """Pictures or a video for a message."""
    server = server_of(request)
    server.check_accepts()
    server.check_model(body.model)
    kind = server.omni.output_kind
    if body.modalities is not None and body.modalities != [kind]:
        raise ApiError(
            400, f"modalities={body.modalities}: the model makes [{kind!r}]", code="invalid_value", param="modalities"
        )
    if kind == "video" and "output_format" in body.model_fields_set:
        raise InvalidRequestError("output_format is that of pictures; the model makes videos", param="output_format")
    prompt = await _prompt(request, body)
    try:
        params = body.sampling_params(body.num_outputs)
        if body.stream:
            return await _stream(request, body, prompt, params)
        output = await unless_disconnected(
            request, server.omni.complete(prompt, params, **placing_of(request, body), kind="chat")
        )
    except InvalidRequestError as error:
        raise _as_sent(error, body) from error
    message = {"role": "assistant", "content": await _content(body, _finished(output))}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return JSONResponse({**_head(server, output.request_id), "choices": [choice], **_tail(server, output)})


async def _prompt(request: Request, body: ChatFields) -> OmniPrompt:
    server = server_of(request)
    content = body.messages[0].content
    parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if not texts:
        raise ApiError(400, "the message has no text", code="missing_required_parameter", param="messages")
    prompt: OmniPrompt = {"prompt": "\n".join(texts)}
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    addresses = [part.image_url.url for part in parts if isinstance(part, PicturePart)]
    server.check_pictures(len(addresses), "messages", "as a part of type image_url")
    if addresses:
        pictures = await unless_disconnected(request, server.media.fetch(addresses, "messages"))
        prompt["multi_modal_data"] = {"image": pictures}
    return prompt


async def _stream(
    request: Request, body: ChatFields, prompt: OmniPrompt, params: OmniDiffusionSamplingParams
) -> Response:
    server = server_of(request)
    watcher = Watcher(progress=False)
    request_id = await server.omni.submit(prompt, params, watcher=watcher, **placing_of(request, body), kind="chat")
    chunks = _chunks(server, body, watcher, request_id)
    return EventStream(chunks, on_end=lambda: server.omni.abort(request_id))


async def _chunks(server: Server, body: ChatFields, watcher: Watcher, request_id: str) -> AsyncIterator[str]:
    """The role at once, the outputs when they are there, and OpenAI's end mark."""
    head = {**_head(server, request_id), "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish_reason: str | None, **more: Any) -> str:
        return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more})

    yield chunk({"role": "assistant", "content": ""}, None)
    output = await watcher.get()
    assert isinstance(output, OmniRequestOutput), "a watcher without progress gets the result alone"
    try:
        content = await _content(body, _finished(output))
    except InvalidRequestError as error:
        yield sse(as_api_error(_as_sent(error, body)).body(), "error")
        return
    except ApiError as error:
        yield sse(error.body(), "error")
        return
    for part in content:
        yield chunk({"content": [part]}, None)
    yield chunk({}, "stop", **_tail(server, output))
    yield "data: [DONE]\n\n"


def _finished(output: OmniRequestOutput) -> OmniRequestOutput:
    """Raises ``InvalidRequestError`` or ``ApiError`` for one that did not finish."""
    if isinstance(output.error, InvalidRequestError):
        raise output.error
    if output.error is not None:
        raise as_api_error(output.error)
    if not output.finished:
        raise ApiError(409, f"{output.request_id} was cancelled", code="cancelled")
    return output


async def _content(body: ChatFields, output: OmniRequestOutput) -> list[dict[str, Any]]:
    """The parts of the answer's message: pictures or videos as data URLs."""
    assert output.receipt is not None, "a finished request has a receipt"
    fps = output.receipt.fps
    if fps is not None:
        videos = [await asyncio.to_thread(encode_video, frames, fps) for frames in output.images]
        urls = [f"data:video/mp4;base64,{base64_text(video)}" for video in videos]
        return [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    pictures = output.flat_images
    files = [await asyncio.to_thread(encode_picture, picture, body.output_format, None) for picture in pictures]
    urls = [data_url(file, body.output_format) for file in files]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _head(server: Server, request_id: str) -> dict[str, Any]:
    created = int(time.time())
    return {"id": request_id, "object": "chat.completion", "created": created, "model": server.model_name}


def _tail(server: Server, output: OmniRequestOutput) -> dict[str, Any]:
    told = server.receipt(output)
    return {"usage": None, "receipt": told["receipt"], "timings": told["timings"]}


def _as_sent(error: InvalidRequestError, body: ChatFields) -> InvalidRequestError:
    names = {"prompt": "messages", "image": "messages", "multi_modal_data": "messages"}
    sent = as_sent(error, body)
    return InvalidRequestError(str(error), param=names.get(sent.param, sent.param))
