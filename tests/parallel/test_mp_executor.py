"""What the executor of many ranks tells of a round that fails. No process is started."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine import mp_executor
from vllm_omni.diffusion.engine.mp_executor import MultiprocessExecutor
from vllm_omni.diffusion.engine.rank_pool import ENDED, RankPool
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.rank_messages import RankBeat, RankReady, RankReply
from vllm_omni.errors import RankFailureError, WeightsError


def rank_that(number, idle_s=0.0, waiting_for=None, silent_s=0.0):
    return SimpleNamespace(
        number=number,
        has_beaten=True,
        beat_time=time.monotonic() - silent_s,
        beat=RankBeat(idle_s=idle_s, waiting_for=waiting_for),
    )


class FakePool:
    """One rank, which answers each command at once until it is told to die."""

    def __init__(self, error=None):
        self.ranks = [rank_that(0)]
        self.dies = False
        self._said = RankReady(error=error)

    def broadcast(self, value):
        if self.dies:
            raise RankFailureError("rank 0 of 1 was killed", rank=0)
        self._said = RankReply(number=value[0], result=WorkerResult())

    def receive(self, timeout_s, hear):
        hear(self.ranks[0], self._said)

    def own_failure(self, rank, cause, detail):
        return RankFailureError(f"rank 3 of 4 {cause}", rank=3, detail=detail)

    def check_starts(self, ready):
        pass

    def check_stalls(self, late, began):
        pass

    def death(self):
        return None

    def close(self, *, gently):
        pass


@pytest.fixture
def started(monkeypatch):
    """Those that are started; ``errors`` are what those to come meet, the last one first."""
    made = SimpleNamespace(pools=[], errors=[])

    def new_pool(*_):
        made.pools.append(FakePool(made.errors.pop() if made.errors else None))
        return made.pools[-1]

    monkeypatch.setattr(mp_executor, "_new_pool", new_pool)
    return made


def test_a_request_that_was_aborted_in_a_round_that_fails_is_not_told_of_again(started):
    executor = MultiprocessExecutor(SimpleNamespace(enforce_eager=True), ParallelLayout())
    executor.execute(WorkerCommand(prepare=tuple(SimpleNamespace(request_id=name) for name in "ab"), step=("a", "b")))
    started.pools[0].dies = True
    result = executor.execute(WorkerCommand(release=("a",), step=("b",)))
    assert list(result.errors) == ["b"]
    assert executor.execute(WorkerCommand(step=())).errors == {}
    executor.close()


def test_what_a_rank_met_at_the_first_start_is_the_error(started):
    started.errors = [WeightsError("a file is cut short")]
    with pytest.raises(WeightsError, match="a file is cut short"):
        MultiprocessExecutor(SimpleNamespace(), ParallelLayout())


def test_a_rank_that_cannot_start_again_is_named_with_what_it_met(started, monkeypatch):
    monkeypatch.setattr(MultiprocessExecutor, "_start_again", lambda _executor: None)
    executor = MultiprocessExecutor(SimpleNamespace(), ParallelLayout())
    executor.execute(WorkerCommand(prepare=(SimpleNamespace(request_id="a"),), step=("a",)))
    started.errors = [WeightsError("a file is cut short")]
    started.pools[0].dies = True
    executor.execute(WorkerCommand(step=("a",)))
    result = executor.execute(WorkerCommand(prepare=(SimpleNamespace(request_id="b"),)))
    (error,) = result.errors.values()
    executor.close()
    assert isinstance(error, RankFailureError)
    assert error.rank == 3
    assert "rank 3 of 4 failed while it started: WeightsError: a file is cut short" in str(error)


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([(5.9, None), (0, "ranks")], None),
        ([(6.1, None), (0, "ranks")], 0),
        ([(6.1, None), (6.4, None)], None),
        ([(8.5, None), (8.6, None)], 1),
        ([(6.2, "compiled"), (6.1, None)], 1),
        ([(7.5, "compiled"), (6.1, "ranks")], 0),
        ([(7.5, "compiled"), (7.6, "compiled")], 1),
        # It may wait for one that is at work.
        ([(50, "compiled"), (0, None)], None),
        ([(50, "compiled"), (50, "device")], None),
        ([(50, "compiled"), (0, "compiler")], None),
        ([(7.5, "compiled"), (0, "ranks")], None),
        ([(59, "ranks"), (59, "compiler")], None),
        ([(0, "ranks"), (61, "compiler")], 1),
        ([(0, None), (61, "compiler")], 1),
        ([(0, "ranks"), (0, None, 6.6)], 1),
        ([(0, "compiler", 59), (0, "ranks")], None),
        ([(0, "compiler", 61), (0, "ranks")], 0),
        # It may be silent because it waits for the other, in a call that stops all of its threads.
        ([(0, "compiler", 7.3), (7.3, None)], 1),
        ([(0, "compiled", 6.6), (6.1, None)], 1),
        ([(99, "ranks"), (99, "device")], None),
        ([(99, "ranks"), (0, None)], None),
        ([(59, "ranks"), (61, "ranks")], 1),
    ],
)
def test_the_rank_that_hangs_is_told_from_those_that_wait_for_it(beats, named):
    ranks = [rank_that(number, *beat) for number, beat in enumerate(beats)]
    pool = SimpleNamespace(ranks=ranks, failure=lambda rank, cause: RankFailureError(cause, rank=rank.number))
    if named is None:
        RankPool.check_stalls(pool, ranks, began=0.0)
        return
    with pytest.raises(RankFailureError) as caught:
        RankPool.check_stalls(pool, ranks, began=0.0)
    assert caught.value.rank == named


def test_what_a_rank_said_during_the_command_before_excuses_nothing():
    ranks = [rank_that(0, 0, "compiler", 6.6), rank_that(1, 9, None, 6.6)]
    pool = SimpleNamespace(ranks=ranks, failure=lambda rank, cause: RankFailureError(cause, rank=rank.number))
    RankPool.check_stalls(pool, ranks, began=time.monotonic() - 6.4)
    with pytest.raises(RankFailureError, match="has given no sign of life for 7 s"):
        RankPool.check_stalls(pool, ranks, began=time.monotonic() - 6.55)


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        (["was killed by SIGKILL", ENDED], "rank 0 of 2 was killed by SIGKILL"),
        ([ENDED, "was killed by SIGKILL"], "rank 1 of 2 was killed by SIGKILL"),
        ([None, ENDED], "rank 0 of 2 lost its connection"),
        ([None, None], "rank 0 of 2 lost its connection"),
    ],
)
def test_what_a_rank_says_yields_to_another_that_was_killed_and_not_to_one_that_ended(ends, named):
    pool = RankPool.__new__(RankPool)
    pool._first, pool._total = 0, len(ends)
    handles = [SimpleNamespace(why_gone=lambda end=end: end) for end in ends]
    pool.ranks = [SimpleNamespace(number=number, handle=handle) for number, handle in enumerate(handles)]
    assert str(pool.failure(pool.ranks[0], "lost its connection")) == named
