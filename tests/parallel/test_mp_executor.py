"""What the executor of many ranks tells of a round that fails. No process is started."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine import mp_executor
from vllm_omni.diffusion.engine.mp_executor import MultiprocessExecutor
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.rank_messages import RankBeat, RankReady, RankReply
from vllm_omni.errors import RankFailureError


class FakePool:
    """One rank, which answers each command at once until it is told to die."""

    def __init__(self):
        self.ranks = [
            SimpleNamespace(
                number=0, has_beaten=True, beat_time=time.monotonic(), beat=RankBeat(idle_s=0.0, waiting_for=None)
            )
        ]
        self.dies = False
        self._said = RankReady()

    def broadcast(self, value):
        if self.dies:
            raise RankFailureError("rank 0 of 1 was killed", rank=0)
        self._said = RankReply(number=value[0], result=WorkerResult())

    def receive(self, timeout_s, hear):
        hear(self.ranks[0], self._said)

    def check_starts(self, ready):
        pass

    def death(self):
        return None

    def close(self, *, gently):
        pass


@pytest.fixture
def pools(monkeypatch):
    started: list[FakePool] = []

    def new_pool(*_):
        started.append(FakePool())
        return started[-1]

    monkeypatch.setattr(mp_executor, "_new_pool", new_pool)
    return started


def test_a_request_that_was_aborted_in_a_round_that_fails_is_not_told_of_again(pools):
    executor = MultiprocessExecutor(SimpleNamespace(enforce_eager=True), ParallelLayout())
    executor.execute(WorkerCommand(prepare=tuple(SimpleNamespace(request_id=name) for name in "ab"), step=("a", "b")))
    pools[0].dies = True
    result = executor.execute(WorkerCommand(release=("a",), step=("b",)))
    assert list(result.errors) == ["b"]
    assert executor.execute(WorkerCommand(step=())).errors == {}
    executor.close()
