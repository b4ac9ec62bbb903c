"""What every request passes: keys, limits, forms that cannot be read. And what those who operate a server ask."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import logging
import socket
import threading
import time

import openai
import pytest

from tests.serving import SMALL, running_server
from vllm_omni import AsyncOmni
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.gate import Gate
from vllm_omni.entrypoints.openai.run import HttpServer, bind, open_storage
from vllm_omni.errors import InvalidConfigError

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def guarded(shipped_omni):
    with running_server(
        shipped_omni, api_key="secret", max_body_mb=1, served_model_name="shapes", allowed_origins=("https://a.test",)
    ) as running:
        yield running


def series(server, name):
    """The value of a metric."""
    text = server.call("GET", "/metrics")[2].decode()
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


def connected(server):
    """A socket to the server."""
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        (b"{not json", {}, "body"),
        (b"[1, 2]", {}, "body"),
        (b'"text"', {}, "body"),
        (b"\xff\xfe", {}, "body"),
        (b"", {}, "body"),
        (b'{"prompt": "a cat"}', {"Content-Type": "text/plain"}, "body"),
        (b"[" * 100_000, {}, "body"),
        (b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}", {}, "body"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400(server, body, headers, param):
    status, _, answer = server.call("POST", GENERATIONS, body, headers)
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error")


def test_a_path_that_does_not_exist_and_a_method_that_does_not_fit(server):
    assert server.call("GET", "/v1/nothing")[2]["error"]["code"] == "unknown_path"
    assert server.call("GET", GENERATIONS)[2]["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("method", "path", "param", "message"),
    [
        ("GET", "/v1/videos?limt=5", "limt", "did you mean 'limit'?"),
        ("GET", "/v1/models?size=64x64", "size", "takes none"),
        ("POST", f"{GENERATIONS}?size=64x64", "size", "takes none"),
    ],
)
def test_a_parameter_that_no_route_knows_is_not_ignored(server, method, path, param, message):
    status, _, answer = server.call(method, path, {"prompt": "a cat"} if method == "POST" else None)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]
    assert server.call("GET", "/?from=elsewhere")[0] == 200


@pytest.mark.parametrize("key", ["wrong", "secre", "secret2", "sécret"])
def test_a_wrong_key_is_a_401(guarded, key):
    status, _, answer = guarded.call("GET", "/v1/models", None, {"Authorization": f"Bearer {key}".encode()})
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_the_key_opens_and_health_needs_none(guarded):
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    assert guarded.call("GET", "/metrics")[0] == 401
    assert guarded.call("GET", "/openapi.json")[0] == 401
    assert [model.id for model in guarded.client("secret").models.list()] == ["shapes"]
    assert guarded.client("secret").models.retrieve("shapes").id == "shapes"
    assert guarded.call("GET", "/health")[0] == guarded.call("GET", "/ready")[0] == 200


def test_a_server_is_not_ready_while_its_workers_start_again(guarded, shipped_omni, monkeypatch):
    monkeypatch.setattr(shipped_omni.engine._executor, "num_ready", 0)
    status, _, answer = guarded.call("GET", "/ready")
    assert (status, answer["error"]["code"]) == (503, "workers_starting")
    assert guarded.call("GET", "/health")[0] == 200


def test_a_port_that_another_server_took_while_the_model_was_loaded_is_said(shipped_omni):
    with bind(ServerConfig(port=0)) as first:
        config = ServerConfig(port=first.getsockname()[1])
        with bind(config) as second, contextlib.closing(open_storage(config)) as storage:
            first.listen()
            with pytest.raises(InvalidConfigError, match=f"port={config.port}: Address already in use"):
                HttpServer(shipped_omni, config, None, second, storage).run()


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(guarded):
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    host, port = guarded.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", GENERATIONS)
    for name, value in (headers | {"Content-Length": str(2**30)}).items():
        connection.putheader(name, value)
    connection.endheaders()  # and not a byte of the gigabyte
    with connection.getresponse() as response:
        assert response.status == 413
        assert json.load(response)["error"]["code"] == "body_too_large"
    connection.close()


def test_a_body_of_unknown_length_is_counted_as_it_comes(guarded):
    host, port = guarded.address.removeprefix("http://").split(":")
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        # It hangs up while the rest is on its way.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", GENERATIONS, itertools.repeat(b" " * 2**16), headers, encode_chunked=True)
        with connection.getresponse() as response:
            assert (response.status, response.headers["Connection"]) == (413, "close")
            error = json.load(response)["error"]
            assert (error["param"], error["code"]) == ("body", "body_too_large")


def opened(server, content_length):
    """A request for pictures whose body is still to come."""
    connection = http.client.HTTPConnection(*server.address.removeprefix("http://").split(":"), timeout=60)
    connection.putrequest("POST", GENERATIONS)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(content_length))
    connection.endheaders()
    return contextlib.closing(connection)


def test_all_uploads_together_are_bounded_and_a_text_gets_through(shipped_omni):
    megabyte = 2**20
    with running_server(shipped_omni, max_body_mb=1, max_uploads_mb=2) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(opened(server, megabyte)) for _ in range(3)]
        for connection in slow[:2]:
            connection.send(b" " * (megabyte - 1))
        gate = server.http_server.config.loaded_app.app
        server.wait_until(lambda: gate._uploaded >= 2 * (megabyte - 1 - 2**16))
        slow[2].send(b" " * (megabyte - 1))  # which was let in while there was room
        with slow[2].getresponse() as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "10")
            assert json.load(response)["error"]["code"] == "too_many_uploads"
        with opened(server, megabyte) as refused, refused.getresponse() as response:  # before a byte of it
            error = json.load(response)["error"]
            assert (response.status, error["param"]) == (503, "body")
            assert "of the 2 MB" in error["message"]
        assert (
            server.call("POST", GENERATIONS, {"prompt": "a cat", "size": "64x64", "num_inference_steps": 1})[0] == 200
        )
        for connection in slow[:2]:
            connection.send(b" ")
            with connection.getresponse() as response:
                assert response.status == 400  # blanks are no JSON
        server.wait_until(lambda: gate._uploaded == 0)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (GENERATIONS, "application/json"),
        ("/v1/videos", "application/json"),
        ("/v1/videos", "multipart/form-data; boundary=XX"),
        ("/v1/images/edits", "multipart/form-data; boundary=XX"),
    ],
)
def test_a_client_that_leaves_while_it_sends_is_no_failure_of_the_server(server, caplog, path, kind):
    def num_left():
        return series(server, 'vllm_omni_http_responses_total{method="POST",status="499"}')

    before = num_left()
    with connected(server) as leaving:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
        leaving.sendall(head.encode() + b"--XX\r\nContent-Disposition: form-data; name=")
        time.sleep(0.1)
    server.wait_until(lambda: num_left() == before + 1, seconds=10)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models", "/ui/style.css"])
def test_head_tells_what_get_would(server, path):
    status, headers, content = server.call("HEAD", path)
    assert (status, content) == (200, b"")
    assert headers["Content-Type"] == server.call("GET", path)[1]["Content-Type"]
    assert int(headers["Content-Length"]) > 0


def test_head_of_what_does_not_end_or_is_not_there(server):
    assert server.call("HEAD", "/v1/requests/none/events")[0] == 405
    assert server.call("HEAD", GENERATIONS)[0] == 405
    assert server.call("HEAD", "/files/none")[0] == 404


def test_a_body_that_stops_coming_is_not_waited_for(shipped_omni):
    with running_server(shipped_omni, body_timeout_s=0.3) as running:
        host, port = running.address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.putrequest("POST", GENERATIONS)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"prompt": ')
        with connection.getresponse() as response:
            assert response.status == 408
            assert json.load(response)["error"]["param"] == "body"
        connection.close()


def received(connection, pause_s=0.0):
    """The number of bytes until the server ends the connection."""
    total = 0
    while part := connection.recv(100_000):
        total += len(part)
        time.sleep(pause_s)
    return total


def test_a_connection_whose_request_does_not_come_is_ended(shipped_omni):
    parts = [b"", b"POST /v1/images/gen", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea"]
    with running_server(shipped_omni, body_timeout_s=0.3) as running, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(running)) for _ in parts]
        for connection, part in zip(connections, parts, strict=True):
            connection.sendall(part)
        assert [received(connection) > 0 for connection in connections] == [False, False, True]


def test_a_connection_whose_answer_is_not_read_is_ended_and_one_that_is_slow_is_not(shipped_omni):
    size = 20_000_000
    with running_server(shipped_omni, send_timeout_s=1) as running:
        # More than the system's buffers hold, in one piece: the gate sees it sent at once.
        running.http_server.state.model_name = "x" * size
        with connected(running) as deaf, connected(running) as slow:
            for connection in (deaf, slow):
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert received(slow, pause_s=0.02) > size
            assert received(deaf) < size


def test_a_client_that_does_not_read_is_let_go_and_harms_nobody():
    ended = []

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append(True)

    async def never(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    gate = Gate(app, ServerConfig(send_timeout_s=0.1), lambda scope, status: None)
    with pytest.raises(OSError, match="unread"):
        asyncio.run(gate(scope, None, never))
    assert ended


def test_a_stream_that_is_not_read_does_not_keep_others_waiting(server, client):
    body = json.dumps({"prompt": "a red circle", "size": "256x256", "stream": True, "partial_images": 3}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    host, port = server.address.removeprefix("http://").split(":")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect((host, int(port)))
        deaf.sendall(f"{head}X-Request-Id: deaf\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_until(lambda: (live := server.omni.live.find("deaf")) is not None and live.step > 0)
        assert client.images.generate(prompt="a red circle", **SMALL).data
        server.wait_until(lambda: server.omni.live.find("deaf").is_finished)
        assert server.state_of("deaf") == "completed"


def test_a_full_queue_is_a_429_that_says_when_to_come_again(qwen_folder):
    with AsyncOmni(str(qwen_folder), max_num_seqs=1, max_queue=1) as omni, running_server(omni) as running:
        long = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 10_000}
        threads = [threading.Thread(target=running.call, args=("POST", GENERATIONS, long)) for _ in range(2)]
        threads[0].start()
        running.wait_until(lambda: omni.engine.num_running == 1)
        threads[1].start()
        running.wait_until(lambda: omni.engine.num_waiting == 1)
        with running.client() as openai_client, pytest.raises(openai.RateLimitError) as caught:
            openai_client.images.generate(prompt="a cat", size="32x32")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert caught.value.code == "queue_full"
        for live in omni.live.in_progress:
            omni.abort(live.request_id)
        for thread in threads:
            thread.join(timeout=60)


def test_an_error_inside_says_nothing_of_this_machine(server, client, monkeypatch):
    pipeline = server.omni.engine._executor._worker._runner.pipeline

    def fails(*_):
        raise RuntimeError("cannot open /home/someone/secret.bin")

    monkeypatch.setattr(pipeline, "predict", fails)
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a red circle", **SMALL)
    assert (caught.value.code, "secret" in str(caught.value.body)) == ("internal_error", False)
    assert "secret" not in str(server.call("GET", "/v1/requests")[2])


def test_browsers_may_call_only_from_origins_that_are_allowed(server, guarded):
    headers = {"Origin": "https://a.test", "Authorization": "Bearer secret"}
    allowed = guarded.call("GET", "/v1/models", None, headers)[1]
    assert allowed["Access-Control-Allow-Origin"] == "https://a.test"
    assert "X-Receipt" in allowed["Access-Control-Expose-Headers"]
    other = headers | {"Origin": "https://b.test"}
    assert "Access-Control-Allow-Origin" not in guarded.call("GET", "/v1/models", None, other)[1]
    assert "Access-Control-Allow-Origin" not in server.call("GET", "/v1/models", None, headers)[1]


def test_metrics_count_what_happened(server, client):
    value = functools.partial(series, server)
    before = value('vllm_omni_requests_total{state="completed"}'), value("vllm_omni_steps_total")
    client.images.generate(prompt="a red circle", **SMALL)
    after = value('vllm_omni_requests_total{state="completed"}'), value("vllm_omni_steps_total")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 3)
    assert value("vllm_omni_requests_waiting") == value("vllm_omni_requests_running") == 0
    assert value('vllm_omni_stage_seconds_count{stage="denoise"}') > 0
    assert value("vllm_omni_peak_memory_bytes") > 10**6
    assert value("vllm_omni_replicas_ready") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70000},
        {"max_queue": 0},
        {"api_key": " "},
        {"api_key": "sécret"},
        {"api_key": "secret\n"},
        {"drain_timeout_s": -1},
        {"max_body_mb": True},
        {"max_uploads_mb": 63},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidConfigError) as caught:
        ServerConfig(**options)
    assert caught.value.option in options
