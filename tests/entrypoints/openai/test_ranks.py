"""A rank that is killed behind the server: who loses what, and how the client hears of it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests.serving import running_server
from vllm_omni import AsyncOmni

LONG = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 5000, "seed": 1}


class Sender:
    """Requests on their way, and their answers by id."""

    def __init__(self, server):
        self.server, self.answers, self._threads = server, {}, []

    def send(self, request_id, **fields):
        def call():
            headers = {"X-Request-Id": request_id}
            self.answers[request_id] = self.server.call("POST", "/v1/images/generations", LONG | fields, headers)

        self._threads.append(threading.Thread(target=call))
        self._threads[-1].start()
        self.server.wait_until(lambda: self.server.call("GET", f"/v1/requests/{request_id}")[0] == 200)

    def wait(self):
        for thread in self._threads:
            thread.join(timeout=60)
        return self.answers


def test_a_killed_rank_ends_what_it_held_with_an_error_that_names_it_and_the_rest_goes_on(qwen_folder):
    with (
        AsyncOmni(str(qwen_folder), device="cpu", tensor_parallel_size=2, max_num_seqs=2) as omni,
        running_server(omni) as server,
    ):
        sender = Sender(server)
        sender.send("first")
        sender.send("second")
        for request_id in ("first", "second"):
            server.wait_until(lambda held=request_id: server.call("GET", f"/v1/requests/{held}")[2]["step"])
        sender.send("waits", num_inference_steps=2, priority=1)
        assert server.state_of("waits") == "queued"
        os.kill(omni.engine._executor.pids[1], signal.SIGKILL)
        answers = sender.wait()
        for request_id in ("first", "second"):
            status, headers, body = answers[request_id]
            assert (status, headers["X-Request-Id"]) == (500, request_id)
            assert body["error"] == {
                "message": "rank 1 of 2 was killed by SIGKILL, and the request was lost with it; send it again",
                "type": "server_error",
                "param": None,
                "code": "rank_failure",
            }
        assert answers["waits"][0] == 200
        assert server.call("POST", "/v1/images/generations", LONG | {"num_inference_steps": 2})[0] == 200
        assert server.call("GET", "/health")[0] == 200
        assert b'errors_total{type="RankFailureError"} 2.0' in server.call("GET", "/metrics")[2]


@pytest.mark.parallel
def test_a_killed_replica_leaves_the_requests_of_the_others_alone(qwen_folder):
    with AsyncOmni(str(qwen_folder), device="cpu", data_parallel_size=2) as omni, running_server(omni) as server:
        sender = Sender(server)
        sender.send("first")
        sender.send("second", num_inference_steps=1000)
        for request_id in ("first", "second"):
            server.wait_until(lambda held=request_id: server.call("GET", f"/v1/requests/{held}")[2]["step"])
        held_by = omni.engine._executor._place["first"]
        os.kill(omni.engine._executor.replicas[held_by].pids[0], signal.SIGKILL)
        answers = sender.wait()
        assert answers["first"][2]["error"]["message"].startswith(f"rank {held_by} of 2 was killed by SIGKILL")
        assert answers["second"][0] == 200
        assert server.call("POST", "/v1/images/generations", LONG | {"num_inference_steps": 2})[0] == 200


@pytest.mark.parallel
def test_a_server_whose_ranks_are_given_up_says_so(qwen_folder):
    with (
        AsyncOmni(str(qwen_folder), device="cpu", tensor_parallel_size=2) as omni,
        running_server(omni) as server,
    ):
        executor = omni.engine._executor
        executor._num_restarts = 3
        sender = Sender(server)
        sender.send("first")
        server.wait_until(lambda: server.call("GET", "/v1/requests/first")[2]["step"])
        os.kill(executor.pids[0], signal.SIGKILL)
        first = sender.wait()["first"][2]["error"]
        second = server.call("POST", "/v1/images/generations", LONG)[2]["error"]
        assert first["message"].startswith("rank 0 of 2 was killed by SIGKILL")
        assert "4 times in a row" in second["message"]
        assert "send it again" not in second["message"]
        assert server.call("GET", "/health")[2]["error"]["code"] == "engine_dead"
        assert server.call("GET", "/ready")[0] == 503
