"""Ranks in processes of their own. A rank that dies, hangs or falls out of step ends the others; all start anew.

What is said to the ranks and heard of them is on threads of its own: an interrupt of the main thread leaves no message
half read, and waits for no step.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine.background import Turns, call_at_times
from vllm_omni.diffusion.engine.rank_pool import Rank, RankPool
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult
from vllm_omni.diffusion.worker.rank_messages import LoadReport, RankReady, RankReply
from vllm_omni.errors import EngineClosedError, OmniError, RankFailureError, first_line
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_POLL_S = 0.1
_WATCH_S = 1.0  # between two looks at ranks that have nothing to do
_STOOD_STILL_S = (
    1.0  # after which this process cannot tell whether ranks were silent: it was stopped, say, and they too
)
# Ranks whose steps are the same answer within moments of each other once one of them has failed.
_GRACE_S = 3.0
_MAX_RESTARTS = 3  # in a row, without a finished request between them
_BACKOFF_S = (0.0, 1.0, 5.0)


class MultiprocessExecutor:
    """One replica of a model on ``layout.world_size`` ranks. ``closing`` ends it, whatever it does, once it is set."""

    def __init__(
        self,
        od_config: OmniDiffusionConfig,
        layout: ParallelLayout,
        on_load_progress: LoadProgress | None = None,
        *,
        first_device: int = 0,
        closing: threading.Event | None = None,
    ) -> None:
        self._config, self._layout, self._first_device = od_config, layout, first_device
        self._on_load_progress = on_load_progress
        self._turns = Turns()
        self._closing = threading.Event() if closing is None else closing
        self._number = 0  # of the last command
        self._in_flight: dict[str, None] = {}
        self._num_restarts = 0
        self._restart_at = 0.0
        self._end: RankFailureError | None = None  # why there will be no other start
        self._pool: RankPool | None = None
        self._is_ready = False
        self._start()
        try:
            self._await_ready()
        except RankFailureError as failure:
            if isinstance(failure.__cause__, OmniError):
                raise failure.__cause__ from None  # it says more than which rank met it
            raise
        call_at_times(self.look_after_ranks, _WATCH_S, self._closing)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def is_alive(self) -> bool:
        return self._end is None

    @property
    def num_ready(self) -> int:
        """1 if a command would begin at once; 0 while the ranks start again."""
        return int(self._is_ready)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [] if self._pool is None else [rank.handle.pid for rank in self._pool.ranks]

    def execute(self, command: WorkerCommand) -> WorkerResult:
        """Run a command on all ranks. A failed rank is an error of every request in progress.

        Nothing comes of a command that only releases, and nobody waits for it: after an interrupt, the ranks may have
        a long step to finish.
        """
        running = self.begin(command)
        return WorkerResult() if command.only_releases else running.result()

    def begin(self, command: WorkerCommand) -> Future[WorkerResult]:
        """The result to come of a command, which runs after those that have begun."""
        return self._turns.begin(self._execute, command)

    def close(self) -> None:
        self._closing.set()
        self._turns.wait(1.0)
        self._drop_pool(gently=True)

    def _execute(self, command: WorkerCommand) -> WorkerResult:
        result = WorkerResult()
        for request_id in command.release:
            self._in_flight.pop(request_id, None)  # it has ended: a failure is none of it
        try:
            self._replace_dead()
            self._in_flight.update((request.request_id, None) for request in command.prepare)
            if not command.only_releases:
                self._recover()
                result = self._run(self._require_pool(), command)
            elif self._is_ready:
                self._say(self._require_pool(), command)
        except RankFailureError as failure:
            result = self._lost(failure)
        for request_id in (*result.finished, *result.errors):
            self._in_flight.pop(request_id, None)
        if result.finished:
            self._num_restarts = 0
        return result

    def _replace_dead(self) -> None:
        """Ranks that died while they had nothing to do cost no request."""
        death = self._death_at_rest()
        if death is not None:
            self._lost(death)

    def _death_at_rest(self) -> RankFailureError | None:
        pool = self._pool
        return pool.death() if self._is_ready and not self._in_flight and pool is not None else None

    def look_after_ranks(self) -> None:
        """Start ranks again that died while they had nothing to do, before a request needs them."""
        if self._death_at_rest() is not None:
            self._turns.begin(self._replace_dead)

    def _require_pool(self) -> RankPool:
        assert self._pool is not None, "the engine gives a closed executor no commands"
        return self._pool

    def _say(self, pool: RankPool, command: WorkerCommand) -> None:
        self._number += 1
        pool.broadcast((self._number, command))

    def _hear(self, pool: RankPool, hear: Callable[[Rank, Any], None]) -> None:
        if self._closing.is_set():
            raise EngineClosedError("the engine was closed")
        pool.receive(_POLL_S, hear)

    def _run(self, pool: RankPool, command: WorkerCommand) -> WorkerResult:
        self._say(pool, command)
        replies: dict[int, RankReply] = {}
        began = heard = time.monotonic()
        failed_at = float("inf")

        def hear(rank: Rank, value: Any) -> None:
            # Nobody has waited for the replies to a command that only released.
            if isinstance(value, RankReply) and value.number == self._number:
                replies[rank.number] = value

        while len(replies) < len(pool.ranks):
            self._hear(pool, hear)
            now = time.monotonic()
            if now - heard > _STOOD_STILL_S:
                began = now
            heard = now
            late = [rank for rank in pool.ranks if rank.number not in replies]
            if any(rank.beat.is_alone and rank.beat.waiting_for != "ranks" for rank in late):
                failed_at = float("inf")  # a preview is decoded: that the others are done sooner tells nothing
            elif any(reply.failed or reply.error is not None for reply in replies.values()):
                failed_at = min(failed_at, now)
            if now - failed_at > _GRACE_S:
                raise self._out_of_step(pool, replies)
            pool.check_stalls(late, began)
        first = replies[0]
        # What the first rank decodes alone may fail there alone.
        lone = first.failed.intersection(command.decode) if self._layout.vae == 1 else frozenset()
        states = {(reply.finished | lone, reply.failed - lone) for reply in replies.values()}
        if len(states) > 1 or first.result is None:
            raise self._out_of_step(pool, replies)
        return first.result

    def _out_of_step(self, pool: RankPool, replies: dict[int, RankReply]) -> RankFailureError:
        """One rank failed where others did not: their states differ from here on."""
        for number, reply in sorted(replies.items()):
            error = reply.error
            if error is None and reply.result is not None:
                error = next(iter(reply.result.errors.values()), None)
            if error is not None:
                detail = f"{type(error).__name__}: {first_line(error)}"
                return pool.failure(pool.ranks[number], "failed", detail)
        return pool.failure(pool.ranks[0], "did not do what the others did")

    def _lost(self, failure: RankFailureError) -> WorkerResult:
        """Every request in progress fails, and the ranks start anew."""
        if self._closing.is_set():
            raise EngineClosedError("the engine was closed") from failure
        if self._end is None:
            logger.error("%s; %d requests are lost", failure, len(self._in_flight))
            self._drop_pool()
            if self._num_restarts >= _MAX_RESTARTS:
                self._end = RankFailureError(
                    f"the ranks failed {self._num_restarts + 1} times in a row and are not started again: find the"
                    " cause, and create the engine anew",
                    rank=failure.rank,
                    detail=str(failure),
                    is_final=True,
                )
                logger.error("%s", self._end)
            else:
                self._restart_at = time.monotonic() + _BACKOFF_S[self._num_restarts]
                self._num_restarts += 1
                self._turns.begin(self._start_again)
        return WorkerResult(errors={request_id: copy.copy(failure) for request_id in self._in_flight})

    def _start_again(self) -> None:
        """Without a command that waits for it."""
        try:
            self._recover()
        except RankFailureError as failure:
            self._lost(failure)

    def _start(self) -> None:
        self._pool = _new_pool(self._config, self._layout, self._first_device)
        # When the interpreter ends, before it kills the ranks: their end is no failure then.
        self._at_exit = weakref.finalize(self, self._closing.set)
        if self._closing.is_set():
            self._drop_pool()
            raise EngineClosedError("the engine was closed")

    def _drop_pool(self, *, gently: bool = False) -> None:
        pool, self._pool, self._is_ready = self._pool, None, False
        if pool is not None:
            self._at_exit.detach()
            pool.close(gently=gently)

    def _recover(self) -> None:
        """Have ranks that are ready. Raises ``RankFailureError`` if they cannot be had."""
        if self._end is not None:
            raise self._end
        if self._is_ready:
            return
        self._closing.wait(max(0.0, self._restart_at - time.monotonic()))
        try:
            self._start()
            self._await_ready()
        except (RankFailureError, EngineClosedError):
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {first_line(error)}"
            raise RankFailureError("the ranks could not be started again", rank=0, detail=detail) from error

    def _await_ready(self) -> None:
        """Wait until every rank has loaded its part. Raises ``RankFailureError``, with what the rank met as cause."""
        pool = self._require_pool()
        ready: set[int] = set()
        failures: list[RankFailureError] = []

        def hear(rank: Rank, value: Any) -> None:
            if isinstance(value, LoadReport) and self._on_load_progress is not None:
                self._on_load_progress(value.done, value.total)
            elif isinstance(value, RankReady):
                ready.add(rank.number)
                if value.error is not None:
                    detail = f"{type(value.error).__name__}: {first_line(value.error)}"
                    # What torch says of a rank that is gone follows from that.
                    failure = pool.own_failure if isinstance(value.error, OmniError) else pool.failure
                    failures.append(failure(rank, "failed while it started", detail))
                    failures[-1].__cause__ = value.error

        try:
            while len(ready) < len(pool.ranks):
                self._hear(pool, hear)
                if failures:  # a rank that lost another says so in torch's words
                    raise next((each for each in failures if isinstance(each.__cause__, OmniError)), failures[0])
                pool.check_starts(ready)
        except BaseException:
            self._drop_pool()
            raise
        self._is_ready = True


def _new_pool(od_config: OmniDiffusionConfig, layout: ParallelLayout, first_device: int) -> RankPool:
    if od_config.parallel_config.distributed_executor_backend == "ray":
        from vllm_omni.diffusion.engine.ray_rank_pool import RayRankPool  # an extra

        return RayRankPool(od_config, layout, first_device)
    return RankPool(od_config, layout, first_device)
