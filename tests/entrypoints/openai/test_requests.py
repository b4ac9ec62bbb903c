"""Watching and ending requests."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request

import openai
import pytest

from tests.serving import SMALL

LONG = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 5000, "seed": 1}


@pytest.fixture
def in_background(server):
    """Send a long request with an id of the test's choice; answers by id are in the dict that comes back."""
    answers, threads = {}, []

    def send(request_id, **fields):
        def call():
            headers = {"X-Request-Id": request_id}
            answers[request_id] = server.call("POST", "/v1/images/generations", LONG | fields, headers)

        threads.append(threading.Thread(target=call))
        threads[-1].start()
        server.wait_until(lambda: server.call("GET", f"/v1/requests/{request_id}")[0] == 200)
        server.wait_until(lambda: server.state_of(request_id) == "running")
        return answers

    yield send
    for request_id in [live.request_id for live in server.omni.live.in_progress]:
        server.omni.abort(request_id)
    for thread in threads:
        thread.join(timeout=90)


def events_of(server, path):
    with urllib.request.urlopen(server.address + path, timeout=90) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for block in response.read().decode().strip().split("\n\n"):
            if not block.startswith(":"):
                name, data = block.split("\n", 1)
                yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_a_request_is_listed_with_its_progress_and_can_be_cancelled(server, in_background):
    answers = in_background("listed")
    described = server.call("GET", "/v1/requests/listed")[2]
    assert (described["size"], described["num_steps"], described["kind"]) == ("64x64", 5000, "image")
    assert described["eta_s"] > 0
    assert "listed" in [entry["id"] for entry in server.call("GET", "/v1/requests")[2]["data"]]
    assert server.call("POST", "/v1/requests/listed/priority", {"priority": -5})[2]["priority"] == -5
    assert server.call("POST", "/v1/requests/listed/priority", {"priority": "x"})[2]["error"]["param"] == "priority"
    assert server.call("DELETE", "/v1/requests/listed")[2]["cancelled"]
    server.wait_until(lambda: "listed" in answers)
    status, headers, answer = answers["listed"]
    assert (status, answer["error"]["code"], headers["X-Request-Id"]) == (409, "cancelled", "listed")
    assert server.state_of("listed") == "aborted"
    for method, path, body in (("DELETE", "", None), ("POST", "/priority", {"priority": 1})):
        status, _, answer = server.call(method, f"/v1/requests/listed{path}", body)
        assert (status, answer["error"]["code"]) == (409, "request_finished")


def test_openais_client_does_not_send_a_cancelled_request_again(server):
    errors = []

    def ask():
        client = server.client().with_options(max_retries=1)
        with client, pytest.raises(openai.ConflictError) as caught:
            client.images.generate(prompt="cancelled once", size="64x64", extra_body={"num_inference_steps": 5000})
        errors.append(caught.value.code)

    def ours():
        entries = server.call("GET", "/v1/requests")[2]["data"]
        return [entry for entry in entries if entry["prompt"] == "cancelled once"]

    asking = threading.Thread(target=ask)
    asking.start()
    server.wait_until(ours)
    server.call("DELETE", f"/v1/requests/{ours()[0]['id']}")
    asking.join(timeout=5)
    assert errors == ["cancelled"]
    assert len(ours()) == 1


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_an_unknown_request_is_a_404(server, method, path):
    status, _, answer = server.call(method, f"/v1/requests/nobody{path}")
    assert (status, answer["error"]["param"]) == (404, "request_id")


def test_whoever_watches_sees_progress_a_preview_and_the_end(server, in_background):
    in_background("watched", num_inference_steps=100)
    events = list(events_of(server, "/v1/requests/watched/events"))
    assert {name for name, _ in events[:-1]} == {"progress"}
    assert events[-1][0] == "completed"
    steps = [content["step"] for _, content in events]
    assert steps == sorted(steps)
    assert any(content.get("preview", "").startswith("data:image/jpeg;base64,") for _, content in events)
    assert [name for name, _ in events_of(server, "/v1/requests/watched/events")] == ["progress", "completed"]


def test_no_preview_is_computed_unless_someone_watches(server, client, monkeypatch):
    runner = server.omni.engine._executor._worker._runner
    shown = []
    show = runner._show

    def counting(previous, result):
        shown.extend(previous)
        show(previous, result)

    monkeypatch.setattr(runner, "_show", counting)
    client.images.generate(prompt="a red circle", **SMALL)
    assert shown == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(server, stream):
    body = json.dumps(LONG | {"stream": stream}).encode()
    request_id = f"dropped-{stream}"
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {request_id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        server.wait_until(lambda: (live := server.omni.live.find(request_id)) is not None and live.step > 2)
    server.wait_until(lambda: server.state_of(request_id) == "aborted")
    assert server.omni.live.find(request_id).step < 2000


def test_ids_come_back_and_bad_or_used_ones_are_refused(server, in_background):
    in_background("used")
    status, _, answer = server.call(
        "POST", "/v1/images/generations", {"prompt": "a cat", "size": "64x64"}, {"X-Request-Id": "used"}
    )
    assert (status, answer["error"]["param"]) == (400, "X-Request-Id")
    assert answer["error"]["message"].startswith("X-Request-Id='used' is in use")
    status, headers, answer = server.call("GET", "/v1/models", None, {"X-Request-Id": "no spaces"})
    assert (status, answer["error"]["param"]) == (400, "X-Request-Id")
    assert "X-Request-Id" not in headers
    assert server.call("GET", "/v1/models")[1]["X-Request-Id"].startswith("req-")
