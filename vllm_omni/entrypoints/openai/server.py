"""What the routes share: the engine, the server's configuration, and how an answer describes itself."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.errors import ApiError, client_left, shutting_down
from vllm_omni.entrypoints.openai.fetch import MediaFetcher
from vllm_omni.entrypoints.openai.protocol import RequestFields
from vllm_omni.entrypoints.openai.storage import Storage
from vllm_omni.errors import InvalidRequestError
from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger(__name__)

_T = TypeVar("_T")


@dataclass(kw_only=True)
class Server:
    """One model that is served. Routes get it by :func:`server_of`."""

    omni: AsyncOmni
    config: ServerConfig
    model_name: str
    storage: Storage
    media: MediaFetcher
    started: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    is_draining: bool = False
    drain_until: float = 0.0  # time.monotonic() seconds

    def check_accepts(self) -> None:
        """Raises ``ApiError`` while the server shuts down."""
        if self.is_draining:
            raise shutting_down()

    def check_model(self, model: str | None) -> None:
        """Raises ``ApiError`` for a model that is not served."""
        if model is not None and model != self.model_name:
            raise ApiError(
                404,
                f"model={model!r} is not served here; this server has {self.model_name!r}",
                code="model_not_found",
                param="model",
            )

    def check_kind(self, kind: str, other: str) -> None:
        """Raises ``ApiError`` if the model does not make ``kind``; ``other`` is the path for what it makes."""
        made = self.omni.output_kind
        if made != kind:
            raise ApiError(
                400,
                f"the model {self.model_name!r} makes {made}s, no {kind}s; use {other}",
                code="unsupported_model",
                param="model",
            )

    def check_pictures(self, num_pictures: int, param: str, how_to_send: str) -> None:
        """Raises ``InvalidRequestError`` for pictures that the model does not take, or where it needs one."""
        if num_pictures and not self.omni.engine.takes_images:
            raise InvalidRequestError("this model takes no pictures, only text; leave them out", param=param)
        if not num_pictures and self.omni.engine.needs_images:
            raise InvalidRequestError(
                f"this model works on a picture, and the request has none; send it {how_to_send}", param=param
            )

    def receipt(self, output: OmniRequestOutput) -> dict[str, Any]:
        """What really ran, and the seconds of each stage. The model goes by its name here, not by its folder."""
        assert output.receipt is not None, "a finished request has a receipt"
        return {
            "id": output.request_id,
            "receipt": {**dataclasses.asdict(output.receipt), "model": self.model_name},
            "timings": dataclasses.asdict(output.metrics),
        }


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server


def served_name(model: str | None, config: ServerConfig, folder: str) -> str:
    """The model's name in the API: never a path of this machine."""
    if config.served_model_name is not None:
        return config.served_model_name
    return Path(folder).name if model is None or Path(model).exists() else model


def placing_of(request: Request, body: RequestFields) -> dict[str, Any]:
    """Keywords of ``AsyncOmni.submit`` by which a request takes its place in the queue."""
    return {
        "request_id": request.state.request_id,  # the client's X-Request-Id, else one that was made for it
        "priority": body.priority,
        "deadline_s": body.deadline_s,
        "client": body.client,
    }


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which is cancelled if the client goes away. The body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise client_left()
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. ``on_end`` runs however the answer ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], object]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except OSError as error:
            logger.info("a stream ended early: %s", error)
        finally:
            self._on_end()


def sse(content: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    line = f"data: {json.dumps(content)}\n\n"
    return line if name is None else f"event: {name}\n{line}"
