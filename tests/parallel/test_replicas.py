"""Which replica gets a request, and that what befalls one leaves the others alone. No process is started."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine import replicas
from vllm_omni.diffusion.engine.background import Turns
from vllm_omni.diffusion.engine.replicas import ReplicatedExecutor
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.errors import EngineClosedError


class FakeReplica:
    """Finishes what it prepares at once."""

    def __init__(self, *_args, first_device, closing):
        self.number, self.is_alive, self.is_closed = first_device, True, False
        self.num_ready, self.num_in_flight = 1, 0
        if first_device == 1 and self.fails:
            raise RuntimeError("the second replica does not start")
        if self.fails and first_device == 2:
            assert closing.wait(30)
            raise EngineClosedError("it still loaded")
        self.made.append(self)

    def begin(self, command):
        future: Future[WorkerResult] = Future()
        future.set_result(WorkerResult(finished={request.request_id: self.number for request in command.prepare}))
        return future

    def close(self):
        self.is_closed = True


@pytest.fixture
def fake(monkeypatch):
    kind = type("Fake", (FakeReplica,), {"fails": False, "made": []})
    monkeypatch.setattr(replicas, "MultiprocessExecutor", kind)
    return kind


def placed(executor, *names):
    command = WorkerCommand(prepare=tuple(SimpleNamespace(request_id=name) for name in names))
    return executor.execute(command).finished


def test_requests_go_to_the_least_busy_replica(fake):
    executor = ReplicatedExecutor(None, ParallelLayout(data=2))
    executor.replicas[0].num_in_flight = 2
    assert placed(executor, "a", "b", "c", "d") == {"a": 1, "b": 1, "c": 0, "d": 1}


def test_a_replica_that_failed_for_good_gets_no_request_though_it_is_idle(fake):
    executor = ReplicatedExecutor(None, ParallelLayout(data=2))
    assert executor.num_ready == 2
    executor.replicas[0].is_alive, executor.replicas[0].num_ready = False, 0
    assert executor.num_ready == 1, "the rest can be told by those who watch the server"
    executor.replicas[1].num_in_flight = 5
    assert placed(executor, "a", "b") == {"a": 1, "b": 1}
    assert executor.is_alive
    executor.replicas[1].is_alive = False
    assert not executor.is_alive


def test_a_replica_that_starts_again_gets_a_request_only_if_no_other_is_ready(fake):
    executor = ReplicatedExecutor(None, ParallelLayout(data=3))
    executor.replicas[0].num_ready = 0
    executor.replicas[1].num_in_flight = 5
    executor.replicas[2].is_alive = False
    assert placed(executor, "a") == {"a": 1}
    executor.replicas[1].num_ready = 0
    assert placed(executor, "a") == {"a": 0}


def test_replicas_that_started_are_closed_if_another_did_not(fake):
    fake.fails = True
    with pytest.raises(RuntimeError, match="the second replica does not start"):
        ReplicatedExecutor(None, ParallelLayout(data=3))
    assert [replica.is_closed for replica in fake.made] == [True]


def test_replicas_that_still_load_do_not_go_on_if_another_did_not_start(fake):
    fake.fails, before = True, time.monotonic()
    with pytest.raises(RuntimeError, match="the second replica does not start"):
        ReplicatedExecutor(None, ParallelLayout(data=3))
    assert time.monotonic() - before < 2


def test_calls_in_the_background_take_turns_and_what_one_raises_stops_no_other():
    turns, begun, order = Turns(), threading.Event(), []

    def first():
        begun.wait(5)
        order.append("first")
        raise ArithmeticError("on purpose")

    failed, later = turns.begin(first), turns.begin(order.append, "second")
    turns.wait(0.05)
    assert order == []
    begun.set()
    with pytest.raises(ArithmeticError, match="on purpose"):
        failed.result(5)
    later.result(5)
    assert order == ["first", "second"]
