"""Servers in this process, on free ports, for tests that talk to them over HTTP."""

from __future__ import annotations

import base64
import faulthandler
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
from PIL import Image

from vllm_omni import AsyncOmni
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.run import HttpServer, bind, open_storage

# Small enough that a test is quick, large enough for the shipped model's patches.
SMALL: dict[str, Any] = {"size": "64x64", "extra_body": {"num_inference_steps": 3, "seed": 1}}


class RunningServer:
    """A server and how to reach it."""

    def __init__(self, http_server: HttpServer) -> None:
        self.http_server = http_server
        self.address = http_server.address
        self.omni = http_server.state.omni

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=api_key, max_retries=0)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        """``(status, headers, parsed JSON or bytes)``; a body of bytes is sent as it is."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.address + path, data=content, method=method, headers=given)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return _read(response, response.status)
        except urllib.error.HTTPError as error:
            with error:
                return _read(error, error.code)

    def state_of(self, request_id: str) -> str:
        return self.call("GET", f"/v1/requests/{request_id}")[2]["state"]

    def wait_until(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)


def _read(response: Any, status: int) -> tuple[int, Any, Any]:
    content = response.read()
    is_json = "json" in response.headers.get("Content-Type", "")
    return status, response.headers, json.loads(content) if is_json and content else content


@contextmanager
def running_server(omni: AsyncOmni, **config: Any):
    """Serve ``omni`` on a free port until the end of the block. The engine stays open."""
    options = ServerConfig(**({"port": 0, "drain_timeout_s": 5} | config))
    server = HttpServer(omni, options, None, bind(options), open_storage(options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield RunningServer(server)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        if thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__)
        assert not thread.is_alive(), "the server did not end"


def differ_by(first: str, second: str) -> int:
    """Greatest difference, of 255, of two pictures in base64: one that shared a batch may differ by rounding."""
    pictures = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in (first, second))
    one, other = (picture.astype(int) for picture in pictures)
    return int(np.abs(one - other).max())
