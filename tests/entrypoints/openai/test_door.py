"""What every request passes: keys, limits, forms that cannot be read. And what those who operate a server ask."""

from __future__ import annotations

import http.client
import json

import openai
import pytest

from tests.serving import SMALL, running_server
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.errors import InvalidConfigError

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def guarded(shipped_omni):
    with running_server(
        shipped_omni, api_key="secret", max_body_mb=1, served_model_name="shapes", allowed_origins=("https://a.test",)
    ) as running:
        yield running


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
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    chunks = (b" " * 2**16 for _ in range(40))
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    try:
        connection.request("POST", GENERATIONS, chunks, headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        return  # it hung up while the rest was on its way
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()


def test_browsers_may_call_only_from_origins_that_are_allowed(server, guarded):
    headers = {"Origin": "https://a.test", "Authorization": "Bearer secret"}
    assert guarded.call("GET", "/v1/models", None, headers)[1]["Access-Control-Allow-Origin"] == "https://a.test"
    other = headers | {"Origin": "https://b.test"}
    assert "Access-Control-Allow-Origin" not in guarded.call("GET", "/v1/models", None, other)[1]
    assert "Access-Control-Allow-Origin" not in server.call("GET", "/v1/models", None, headers)[1]


def test_metrics_count_what_happened(server, client):
    def value(name):
        text = server.call("GET", "/metrics")[2].decode()
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    before = value('vllm_omni_requests_total{state="completed"}'), value("vllm_omni_steps_total")
    client.images.generate(prompt="a red circle", **SMALL)
    after = value('vllm_omni_requests_total{state="completed"}'), value("vllm_omni_steps_total")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 3)
    assert value("vllm_omni_requests_waiting") == value("vllm_omni_requests_running") == 0
    assert value('vllm_omni_stage_seconds_count{stage="denoise"}') > 0
    assert value("vllm_omni_peak_memory_bytes") > 10**6


@pytest.mark.parametrize(
    "options", [{"port": 70000}, {"max_queue": 0}, {"api_key": " "}, {"drain_timeout_s": -1}, {"max_body_mb": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidConfigError) as caught:
        ServerConfig(**options)
    assert caught.value.option in options
