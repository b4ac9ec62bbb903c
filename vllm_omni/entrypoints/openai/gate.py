"""What every request passes before any route: its id, the key, HEAD, and limits on what is sent and left unread."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.diffusion.request import new_request_id
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.errors import ApiError, BodyRefusedError, shutting_down

# Whoever asks whether the server lives need not know the key, nor does the page, which asks its user for it. The name
# of a stored result is a secret of its own.
_OPEN = re.compile(r"/|/health|/ready|/ui(/.*)?|/files/.*|/favicon\.ico")
# What HEAD may ask about: what GET has at once.
_HEAD = re.compile(
    r"/|/health|/ready|/metrics|/openapi\.json|/ui/.*|/files/.*|/v1/models(/.*)?|/v1/videos/[^/]+/content"
)
# Of each body so much is not counted among all uploads: uvicorn holds it for each connection anyway, and requests for
# pictures of a text get through while others send files.
_UNCOUNTED_BYTES = 2**16
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

ObserveResponse = Callable[[Scope, int], None]


class Gate:
    """An ASGI application around the server. Routes find the request's id in ``scope["state"]["request_id"]``."""

    def __init__(self, app: ASGIApp, config: ServerConfig, observe: ObserveResponse) -> None:
        self._app = app
        self._config = config
        self._observe = observe
        self._uploaded = 0  # bytes of the bodies of all requests in hand
        self._key_digest = None if config.api_key is None else _digest(config.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id")
        if request_id is None:
            request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        send = self._sending(scope, send, request_id)
        refusal = self._refusal(scope, headers, request_id)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        if scope["method"] == "HEAD" and _HEAD.fullmatch(scope["path"]):
            scope = {**scope, "method": "GET"}  # uvicorn, which knows better, sends the head alone
        upload = _Upload()
        try:
            await self._app(scope, self._receiving(receive, upload), send)
        except asyncio.CancelledError:
            # uvicorn ends what is left when the time to finish is over. An answer that has begun breaks off.
            if not scope["state"].get("has_answer"):
                await shutting_down().response()(scope, receive, send)
        finally:
            self._uploaded -= upload.num_counted

    def _refusal(self, scope: Scope, headers: Headers, request_id: str) -> ApiError | None:
        if not _REQUEST_ID.fullmatch(request_id):
            return ApiError(
                400,
                "X-Request-Id must be 1 to 128 letters, digits, dots, colons, dashes and underscores",
                code="invalid_value",
                param="X-Request-Id",
            )
        if not self._may_enter(scope, headers):
            return ApiError(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                param="Authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body:
            return self._too_large()
        if length.isdecimal() and int(length) - _UNCOUNTED_BYTES > self._max_uploads - self._uploaded:
            return self._too_many()
        return None

    def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if self._key_digest is None or _OPEN.fullmatch(scope["path"]) or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests are compared, so that neither a key's letters nor its length can be told from the time it takes.
        return hmac.compare_digest(_digest(key.strip()), self._key_digest) and scheme.lower() == "bearer"

    @property
    def _max_body(self) -> int:
        return self._config.max_body_mb * 2**20

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self._config.max_body_mb} MB, which is what this server takes",
            code="body_too_large",
            param="body",
            headers={"Connection": "close"},
        )

    @property
    def _max_uploads(self) -> int:
        return self._config.max_uploads_mb * 2**20

    def _too_many(self) -> ApiError:
        return ApiError(
            503,
            f"the bodies of the requests in hand have {self._uploaded / 2**20:.0f} of the {self._config.max_uploads_mb}"
            " MB that this server holds at a time; send the request again later",
            code="too_many_uploads",
            param="body",
            headers={"Connection": "close", "Retry-After": "10"},
        )

    def _receiving(self, receive: Receive, upload: _Upload) -> Receive:
        """Count the body as it comes: a client need not tell its length."""
        complete = False

        async def bounded() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                with anyio.fail_after(self._config.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                text = "the rest of the body did not come in time"
                raise HTTPException(408, text, {"Connection": "close"}) from None
            upload.num_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            more = max(0, upload.num_bytes - _UNCOUNTED_BYTES) - upload.num_counted
            refusal = None
            if upload.num_bytes > self._max_body:
                refusal = self._too_large()
            elif more > self._max_uploads - self._uploaded:
                refusal = self._too_many()
            if refusal is not None:
                raise BodyRefusedError(refusal)
            upload.num_counted += more
            self._uploaded += more
            return message

        return bounded

    def _sending(self, scope: Scope, send: Send, request_id: str) -> Send:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if _REQUEST_ID.fullmatch(request_id):
                    headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                self._observe(scope, message["status"])
                scope["state"]["has_answer"] = True
            # A client that reads nothing blocks its answer; it must not hold it for ever.
            try:
                with anyio.fail_after(self._config.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise OSError(f"the client left its answer unread for {self._config.send_timeout_s:g} s") from None

        return marked


@dataclass
class _Upload:
    """A body on its way, and after it while its request is in hand."""

    num_bytes: int = 0
    num_counted: int = 0  # among all uploads


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
