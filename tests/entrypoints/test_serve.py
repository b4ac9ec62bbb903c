"""``vllm-omni serve`` as a process: how it starts, drains, and is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests import tiny_wan
from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.main import main

SMALL = {"prompt": "a red circle", "size": "64x64", "seed": 1}


class Served:
    """A server in a process of its own."""

    def __init__(self, *arguments, cwd):
        command = [sys.executable, "-m", "vllm_omni", "serve", *map(str, arguments), "--omni", "--port", "0"]
        path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd, env=environment)
        line = self.process.stdout.readline()
        assert line.startswith("serving "), line
        self.address = line.split()[-1]

    def call(self, method, path, body=None):
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, content, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def end(self, number, timeout=60):
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def served(*arguments, cwd):
    running = Served(*arguments, cwd=cwd)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        running.process.stdout.close()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_after_sigterm_what_runs_is_finished_and_the_status_is_0(tmp_path):
    with served("--drain-timeout-s", 60, cwd=tmp_path) as server:
        answers = []
        body = SMALL | {"num_inference_steps": 100}
        client = threading.Thread(target=lambda: answers.append(server.call("POST", "/v1/images/generations", body)))
        client.start()
        until(lambda: any(entry["state"] == "running" for entry in server.call("GET", "/v1/requests")["data"]))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # the signal is noticed within a tenth of a second
        assert status_of(server, "GET", "/ready") == 503
        assert status_of(server, "POST", "/v1/images/generations", SMALL) == 503
        assert server.call("GET", "/v1/requests")["data"][0]["state"] == "running"
        client.join(timeout=60)
        assert server.process.wait(60) == 0
    assert answers[0]["timings"]["num_steps"] == 100
    with pytest.raises(urllib.error.URLError):
        server.call("GET", "/health")


def test_a_request_that_does_not_end_in_time_does_not_keep_the_server(tmp_path, capfd):
    with served("--drain-timeout-s", 6, cwd=tmp_path) as server:
        body = SMALL | {"num_inference_steps": 10_000}
        statuses = []
        ask = partial(status_of, server, "POST", "/v1/images/generations", body)
        client = threading.Thread(target=lambda: statuses.append(ask()))
        client.start()
        until(lambda: any(entry["state"] == "running" for entry in server.call("GET", "/v1/requests")["data"]))
        started = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 6
        client.join(timeout=30)
    assert statuses == [503]
    assert "Traceback" not in capfd.readouterr().err


def status_of(server, method, path, body=None):
    try:
        server.call(method, path, body)
    except urllib.error.HTTPError as error:
        return error.code if json.load(error)["error"]["code"] == "shutting_down" else None
    return 200


def test_ten_video_jobs_survive_kill_9(tmp_path):
    model = tiny_wan.wan_t2v(tmp_path / "model", num_experts=1)
    storage = tmp_path / "storage"
    body = {"prompt": "a cat", "size": "48x32", "num_frames": 5, "num_inference_steps": 40}
    with served(model, "--storage-dir", storage, cwd=tmp_path) as server:
        ids = [server.call("POST", "/v1/videos", body | {"seed": seed})["id"] for seed in range(10)]
        until(lambda: "in_progress" in {server.call("GET", f"/v1/videos/{key}")["status"] for key in ids})
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    with served(model, "--storage-dir", storage, cwd=tmp_path) as server:
        jobs = {}

        def all_ended():
            jobs.update({key: server.call("GET", f"/v1/videos/{key}") for key in ids})
            return all(job["status"] in ("completed", "failed") for job in jobs.values())

        until(all_ended)
        assert [job["status"] for job in jobs.values()] == ["completed"] * 10
        assert [jobs[key]["receipt"]["seeds"] for key in ids] == [[seed] for seed in range(10)]
        with urllib.request.urlopen(f"{server.address}/v1/videos/{ids[0]}/content") as response:
            assert response.read()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port=70000 must lie between"),
        (["--api-key", " "], "api_key is empty"),
        (["--max-queue", "0"], "max_queue=0 must be at least 1"),
        (["/nowhere/at/all", "--port", "0"], "no such folder"),
        (["--scheduling-policy", "fastest"], "invalid choice"),
    ],
)
def test_bad_options_are_told_before_anything_is_loaded(arguments, message, capsys):
    try:
        status = main(["serve", *arguments])
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


def test_a_storage_that_cannot_be_used_is_told_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "AsyncOmni", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/jobs.sqlite3").write_bytes(b"no database" * 100)
    for name, message in (
        ("file", "cannot be used: Not a directory"),
        ("broken", "jobs.sqlite3 in it: file is not a data"),
    ):
        assert main(["serve", "--port", "0", "--storage-dir", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_port_in_use_ends_the_server_with_an_error(tmp_path):
    with served(cwd=tmp_path) as server:
        port = server.address.rpartition(":")[2]
        command = [sys.executable, "-m", "vllm_omni", "serve", "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert f"port={port}: Address already in use" in second.stderr
