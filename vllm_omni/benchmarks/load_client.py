"""Requests of a load, over HTTP, as any server takes them that speaks OpenAI's interface."""

from __future__ import annotations

import http.client
import io
import json
import secrets
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from PIL import Image

from vllm_omni.benchmarks.load import PlannedRequest, RequestError

_SECONDS_BETWEEN_POLLS = 0.1
_MAX_SHOWN = 200


class LoadClient:
    """Sends planned requests to the server at ``base_url``. Called from many threads; each call has its connection."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        model: str | None,
        prompts: list[str],
        image: bytes,
        timeout_s: float,
    ) -> None:
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url={base_url!r} must read http://HOST:PORT or https://HOST")
        self._address = address
        self._key = api_key
        self._model = model
        self._prompts = prompts
        self._image = image
        self._timeout_s = timeout_s

    def models(self) -> list[str]:
        """The names of the models that are served."""
        return [entry["id"] for entry in json.loads(self._call("GET", "/v1/models"))["data"]]

    def send(self, request: PlannedRequest) -> int:
        """Carry a request out and return the number of its outputs. Raises ``RequestError``."""
        body: dict[str, Any] = {"prompt": self._prompts[request.index % len(self._prompts)], **request.group.fields}
        if self._model is not None:
            body["model"] = self._model
        try:
            return TASKS[request.group.task](self, body)
        except (ValueError, LookupError, TypeError) as error:
            raise RequestError("malformed answer", f"{type(error).__name__}: {error}") from error

    def generate(self, body: dict[str, Any]) -> int:
        return _num_images(self._post("/v1/images/generations", body))

    def edit(self, body: dict[str, Any]) -> int:
        content, content_type = _form({name: _text(value) for name, value in body.items()}, self._image)
        return _num_images(self._call("POST", "/v1/images/edits", content, content_type))

    def chat(self, body: dict[str, Any]) -> int:
        text = body.pop("prompt")
        answer = json.loads(
            self._post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})
        )
        contents = [choice["message"]["content"] for choice in answer["choices"]]
        return sum(len(content) if isinstance(content, list) else 1 for content in contents)

    def video(self, body: dict[str, Any]) -> int:
        """A job, until its file is here."""
        job = json.loads(self._post("/v1/videos", body))
        ends = time.monotonic() + self._timeout_s
        while job["status"] not in ("completed", "failed"):
            if time.monotonic() > ends:
                raise RequestError("timeout", f"{job['id']} is {job['status']} after {self._timeout_s:g} s")
            time.sleep(_SECONDS_BETWEEN_POLLS)
            job = json.loads(self._call("GET", f"/v1/videos/{job['id']}"))
        if job["status"] == "failed":
            error = job.get("error") or {}
            raise RequestError(f"job {error.get('code')}", str(error.get("message")))
        self._call("GET", f"/v1/videos/{job['id']}/content")
        return 1

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._call("POST", path, json.dumps(body).encode())

    def _call(self, method: str, path: str, content: bytes | None = None, kind: str = "application/json") -> bytes:
        https = self._address.scheme == "https"
        connection = (http.client.HTTPSConnection if https else http.client.HTTPConnection)(
            str(self._address.hostname), self._address.port, timeout=self._timeout_s
        )
        headers = {"Content-Type": kind} | ({} if self._key is None else {"Authorization": f"Bearer {self._key}"})
        try:
            connection.request(method, self._address.path.rstrip("/") + path, content, headers)
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError as error:
            raise RequestError("timeout", f"no answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"connection: {type(error).__name__}", str(error)) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise _error(response.status, answer)
        return answer


TASKS: dict[str, Callable[[LoadClient, dict[str, Any]], int]] = {
    "generate": LoadClient.generate,
    "edit": LoadClient.edit,
    "chat": LoadClient.chat,
    "video": LoadClient.video,
}


def plain_picture() -> bytes:
    """A picture to work on, where none is given: 256 x 256, png."""
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def _num_images(answer: bytes) -> int:
    return len(json.loads(answer)["data"])


def _error(status: int, answer: bytes) -> RequestError:
    try:
        error = json.loads(answer)["error"]
        return RequestError(f"{status} {error.get('code') or error.get('type')}", str(error.get("message")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return RequestError(str(status), answer[:_MAX_SHOWN].decode("utf-8", "replace"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _form(fields: dict[str, str], image: bytes) -> tuple[bytes, str]:
    """``(body, content type)`` of a form with one picture."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in fields.items()
    ]
    head = 'Content-Disposition: form-data; name="image"; filename="image.png"\r\nContent-Type: image/png'
    parts += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), image, f"\r\n--{boundary}--\r\n".encode()]
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"
