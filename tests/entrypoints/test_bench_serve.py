"""``vllm-omni bench serve``: what is sent when, and what is told of it."""

from __future__ import annotations

import json
import math
import threading
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tests import tiny_wan
from tests.serving import running_server
from vllm_omni import AsyncOmni
from vllm_omni.benchmarks.load import RequestError, RequestGroup, RequestSample, plan_requests, run_load
from vllm_omni.benchmarks.load_client import _error
from vllm_omni.benchmarks.load_report import summarize
from vllm_omni.entrypoints.cli.main import main

SMALL = RequestGroup(name="small", weight=9, task="generate", fields={})
LARGE = RequestGroup(name="large", weight=1, task="generate", fields={}, slo_s=1.0)
SIZE = "size=64x64,steps=2"


@pytest.fixture(scope="module")
def server():
    with AsyncOmni(max_queue=64) as omni, running_server(omni) as running:
        yield running


def test_arrivals_are_a_poisson_process_of_the_asked_rate():
    planned = plan_requests([SMALL, LARGE], 4000, rate=5.0, burstiness=1.0, seed=0)
    gaps = np.diff([request.arrival_s for request in planned])
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "an exponential distribution's"
    assert sum(request.group is LARGE for request in planned) == pytest.approx(400, rel=0.1)
    assert planned == plan_requests([SMALL, LARGE], 4000, rate=5.0, burstiness=1.0, seed=0)
    even = np.diff([request.arrival_s for request in plan_requests([SMALL], 4000, 5.0, 100.0, 0)])
    assert even.std() < 0.2 * even.mean()


def test_a_closed_loop_keeps_so_many_clients_busy():
    running, most, lock = 0, 0, threading.Lock()

    def send(request):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 1

    samples = run_load(plan_requests([SMALL], 20, math.inf, 1.0, 0), send, max_concurrency=3)
    assert most == 3
    assert len(samples) == 20
    assert all(sample.latency_s < 0.1 for sample in samples), "a client does not wait before it sends"


def test_a_request_of_an_open_loop_that_waits_for_a_place_has_waited():
    planned = plan_requests([SMALL], 4, 1000.0, 1.0, 0)
    samples = run_load(planned, lambda _: time.sleep(0.05) or 1, max_concurrency=1)
    assert max(sample.latency_s for sample in samples) > 0.15


def test_figures_count_errors_and_missed_objectives():
    def sample(group, arrival, finished, error=None):
        return RequestSample(
            group=group, arrival_s=arrival, sent_s=arrival, finished_s=finished, num_outputs=1 - (error is not None),
            error=error,
        )  # fmt: skip

    samples = [sample("small", 0, 2), sample("small", 0, 4), sample("large", 0, 0.5), sample("large", 3, 4.5)]
    samples += [sample("large", 3, 3.1, error="429 queue_full")]
    figures = summarize(samples, [SMALL, LARGE], [50])
    assert figures["duration_s"] == 4.5
    assert figures["max_in_flight"] == 3
    assert figures["num_completed"] == 4
    assert figures["requests_per_s"] == pytest.approx(4 / 4.5)
    assert figures["latency_s"]["p50"] == pytest.approx(1.75)
    assert figures["errors"] == {"429 queue_full": 1}
    assert figures["slo_attainment"] == pytest.approx(1 / 3), "of the three with an objective"
    assert figures["goodput_per_s"] == pytest.approx(1 / 4.5)
    assert figures["groups"]["small"]["slo_attainment"] is None
    assert figures["groups"]["small"]["latency_s"]["p50"] == 3


def test_a_mixed_load_is_measured_and_drawn(server, tmp_path, capsys):
    report, plot = tmp_path / "load.json", tmp_path / "load.svg"
    command = ["bench", "serve", "--base-url", server.address, "--num-prompts", "12", "--request-rate", "200"]
    command += ["--mix", f"3:{SIZE},slo=60", "--mix", f"1:task=chat,{SIZE}", "--mix", "1:size=33x33,slo=60"]
    assert main([*command, "--num-warmup", "0", "--output-json", str(report), "--output-svg", str(plot)]) == 0
    results = json.loads(report.read_text())
    chosen = list(results["groups"].values())
    assert sum(group["num_requests"] for group in chosen) == len(results["requests"]) == 12
    good, chat, bad = chosen
    assert good["num_completed"] == good["num_outputs"] == good["num_requests"] > 0
    assert chat["num_completed"] == chat["num_outputs"] == chat["num_requests"] > 0
    assert bad["errors"] == {"400 invalid_value": bad["num_requests"]}
    assert (good["slo_attainment"], bad["slo_attainment"]) == (1.0, 0.0)
    assert good["latency_s"]["p50"] <= good["latency_s"]["p99"]
    assert results["environment"]["versions"]["vllm-omni"]
    assert len(list(ET.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}circle"))) == 12 - sum(
        bad["errors"].values()
    )
    out = capsys.readouterr().out
    assert "12 requests, 200 requests/s" in out
    assert f"errors: {bad['num_requests']} x 400 invalid_value" in out


def test_a_video_is_waited_for_until_its_file_is_here(tmp_path, capsys):
    with AsyncOmni(str(tiny_wan.wan_t2v(tmp_path / "model"))) as omni, running_server(omni) as running:
        command = ["bench", "serve", "--base-url", running.address, "--num-prompts", "2", "--max-concurrency", "1"]
        mix = "task=video,size=48x32,num_frames=5,steps=2,guidance_scale=1,guidance_scale_2=1"
        assert main([*command, "--num-warmup", "0", "--mix", mix]) == 0
    assert ["completed", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_server_that_is_not_there_or_answers_nonsense_is_an_error(server, capsys):
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "does not list its models" in capsys.readouterr().err
    command = ["bench", "serve", "--base-url", server.address, "--num-prompts", "1", "--mix", "size=33x33"]
    assert main(command) == 1
    assert "a request of the warm-up failed: 400 invalid_value" in capsys.readouterr().err
    assert main([*command, "--num-warmup", "0"]) == 1
    assert "no request was completed" in capsys.readouterr().err
    assert main(["bench", "serve", "--base-url", "localhost"]) == 2


@pytest.mark.parametrize("mix", ["0:size=64x64", "task=paint", "size", "1:slo=never", "1:steps="])
def test_a_mix_that_cannot_be_read_is_refused(mix):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", "--mix", mix])
    assert caught.value.code == 2


def test_an_error_in_another_form_is_counted_by_its_status():
    assert _error(502, b"<html>").kind == "502"
    assert isinstance(_error(500, b'{"detail": "x"}'), RequestError)


def test_a_file_that_cannot_be_written_is_said_before_the_server_is_asked(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option in ("--output-json", "--output-svg"):
        path = str(tmp_path / "file" / "result")
        assert main(["bench", "serve", "--base-url", "http://localhost:1", option, path]) == 2
        assert f"{option} {path} cannot be written: " in capsys.readouterr().err
