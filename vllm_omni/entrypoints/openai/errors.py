"""Every error as OpenAI's clients expect it: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vllm_omni.errors import (
    EngineClosedError,
    EngineFailureError,
    GenerationError,
    InsufficientMemoryError,
    InvalidRequestError,
    NonFiniteOutputError,
    QueueFullError,
    RankFailureError,
)
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_MAX_SHOWN = 100
_MAX_MESSAGE = 2000
_SOURCES = ("body", "query", "path", "header")
# OpenAI's clients send a request again after these, unless they are told not to: one that was cancelled would run anew.
_NOT_TO_BE_RETRIED = (409, 501)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_shown(message, _MAX_MESSAGE))
        self.status = status
        self.code = code
        self.param = None if param is None else _shown(param, _MAX_SHOWN)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        advice = {"X-Should-Retry": "false"} if self.status in _NOT_TO_BE_RETRIED else {}
        return JSONResponse(self.body(), self.status, advice | self.headers)


class BodyRefusedError(HTTPException):
    """An ``ApiError`` met while a route reads the body: of all errors, FastAPI lets only this kind through."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, str(error), error.headers)
        self.error = error


def as_api_error(error: BaseException, *, log: bool = True) -> ApiError:
    """How an error of the engine is told. An error of ours says nothing of this machine; others go to the log alone.

    ``log=False`` is for one that was told before.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationError) and error.__cause__ is not None:
        return as_api_error(error.__cause__, log=log)
    if isinstance(error, InvalidRequestError) and error.param == "request_id":
        # Of a request that is sent, the engine's name; clients send it as a header.
        text = str(error).replace("request_id=", "X-Request-Id=", 1)
        return ApiError(400, text, code="invalid_value", param="X-Request-Id")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), code="invalid_value", param=error.param)
    if isinstance(error, ClientDisconnect):
        return client_left()
    if isinstance(error, QueueFullError):
        retry_after = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": retry_after})
    if isinstance(error, EngineClosedError):
        return shutting_down()
    if isinstance(error, InsufficientMemoryError):
        return ApiError(500, str(error), code="insufficient_memory")
    if isinstance(error, NonFiniteOutputError):
        return ApiError(500, str(error), code="non_finite_output")
    if isinstance(error, RankFailureError):
        remedy = "" if error.is_final else ", and the request was lost with it; send it again"
        return ApiError(500, error.summary + remedy, code="rank_failure")
    if isinstance(error, EngineFailureError):
        return ApiError(500, "the engine failed while the request ran; send it again", code="engine_failure")
    if log:
        logger.error("a request failed inside", exc_info=error)
    return ApiError(500, "the request failed inside the server; its log has the cause", code="internal_error")


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def client_left() -> ApiError:
    """Nobody reads it; it is counted."""
    return ApiError(499, "the client went away", code="client_disconnected")


def install_error_handlers(app: FastAPI) -> None:
    """Bring what routes and FastAPI raise into one form."""

    async def tell(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def tell_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), "registered for this type"
        return _validation_error(error).response()

    async def tell_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), "registered for this type"
        return _http_error(error).response()

    app.add_exception_handler(RequestValidationError, tell_validation)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(Exception, tell)
    for kind in (ApiError, InvalidRequestError, ClientDisconnect, QueueFullError, EngineClosedError, GenerationError):
        app.add_exception_handler(kind, tell)


def validation_error(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors, as one that names its field and shows what came."""
    first = errors[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, InvalidRequestError):
        return as_api_error(raised)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json", param="body")
    # What stands in <> is no field but which one of several types was meant.
    path = [part for part in map(str, first["loc"]) if part not in _SOURCES and not part.startswith("<")]
    if not path:
        expected = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return ApiError(400, expected, code="invalid_body", param="body")
    param = ".".join(path)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    shown = _shown(repr(first.get("input")), _MAX_SHOWN)
    text = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(400, f"{param}={shown}: {text}", code="invalid_value", param=param)


def _shown(text: str, most: int) -> str:
    """What came from outside may be as long as a body, and hold halves of surrogate pairs, which UTF-8 cannot."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut.encode("utf-8", "backslashreplace").decode("utf-8")


def _validation_error(error: RequestValidationError) -> ApiError:
    return validation_error(list(error.errors()))


def _http_error(error: HTTPException) -> ApiError:
    if isinstance(error, BodyRefusedError):
        return error.error
    if isinstance(error.__cause__, ClientDisconnect):  # FastAPI says of a body that ended so that it cannot be read
        return client_left()
    texts = {
        404: "there is no such path; GET /openapi.json lists what there is",
        405: "this path does not take this method; GET /openapi.json lists what there is",
        400: "the body cannot be read; send JSON in UTF-8 with the header Content-Type: application/json",
    }
    codes = {404: "unknown_path", 405: "method_not_allowed", 400: "invalid_body"}
    code = codes.get(error.status_code, f"http_{error.status_code}")
    param = "body" if error.status_code in (400, 408) else None
    return ApiError(
        error.status_code,
        texts.get(error.status_code, str(error.detail)),
        code=code,
        param=param,
        headers=error.headers,
    )
