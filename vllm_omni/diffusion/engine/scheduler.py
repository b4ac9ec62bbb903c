"""Which requests take the next denoising step.

Each round has one piece of work. A request whose steps are done is decoded. Otherwise the policy ranks all requests,
those that wait and those in progress alike; the first that may run leads, and as many of the same shape join it as
raise the throughput. So requests join and leave between any two steps, and one that was begun does not keep a shorter
one waiting for longer than a step. A waiting request begins when its first step is due, so it holds memory only then.
Of replicas each gets such a batch: a round has as many rows, and as many requests to decode, as all of them can take.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from typing import Any

from vllm_omni.diffusion.engine.memory_budget import MemoryBudget, output_volume
from vllm_omni.diffusion.engine.policies import Moment, ScheduledRequest, rank
from vllm_omni.diffusion.engine.step_costs import StepCosts
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult

__all__ = ["ScheduledRequest", "Scheduler"]


_SECONDS_OF_A_RANKING = 0.02


class Scheduler:
    """Keeps waiting and running requests. One thread calls ``schedule`` and ``update``, any thread the rest.

    Without ``measured_batches`` a batch is as large as it may be, so that equal calls compute the same to the last bit.
    """

    def __init__(
        self,
        max_num_seqs: int,
        policy: str = "shortest",
        budget: MemoryBudget | None = None,
        *,
        measured_batches: bool = True,
        num_replicas: int = 1,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._policy = policy
        self._budget = MemoryBudget() if budget is None else budget
        self._costs = StepCosts()
        self._measured_batches = measured_batches
        self._num_replicas = num_replicas
        self._waiting: dict[str, ScheduledRequest] = {}
        self._running: dict[str, ScheduledRequest] = {}
        self._served_clients: dict[str, float] = {}
        self._aborted: set[str] = set()
        self._lost: list[str] = []  # failed, while workers may still hold their states
        self._ranking: list[ScheduledRequest] | None = None  # None after requests came or left
        self._ranked_at = 0.0
        self._lock = threading.Lock()

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, scheduled: ScheduledRequest) -> None:
        with self._lock:
            scheduled.arrived = time.monotonic()
            scheduled.client = scheduled.client or scheduled.request_id  # one without a client stands for itself
            self._count_in(scheduled.client)
            self._waiting[scheduled.request_id] = scheduled
            self._ranking = None

    def _count_in(self, client: str) -> None:
        """A client that comes, or comes again, begins even with the least served: time away counts for nothing."""
        in_hand = {item.client: self._served_clients[item.client] for item in self._all()}
        least = min(in_hand.values(), default=0.0)
        ahead = {name: seconds for name, seconds in self._served_clients.items() if seconds > least}
        self._served_clients = {client: least} | ahead | in_hand

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority. False if it is not in progress."""
        with self._lock:
            found = self._running.get(request_id) or self._waiting.get(request_id)
            if found is not None:
                found.priority, self._ranking = priority, None
            return found is not None

    def abort(self, request_id: str) -> bool:
        """End a request before its next step. False if it is not in progress."""
        with self._lock:
            known = request_id in self._running or request_id in self._waiting
            if known:
                self._aborted.add(request_id)
            return known

    def find(self, request_id: str) -> ScheduledRequest | None:
        with self._lock:
            return self._running.get(request_id) or self._waiting.get(request_id)

    def shortage(self, scheduled: ScheduledRequest) -> tuple[float, float] | None:
        """Needed and available bytes of a request that does not fit even alone."""
        with self._lock:
            return self._budget.shortage(scheduled)

    def seconds_left(self) -> dict[str, float]:
        """Estimated seconds until each request is done, by id, the first to be served first."""
        with self._lock:
            total, left, ranked = 0.0, {}, self._ranked()
            num_rows = Counter[Any]()
            for item in ranked:
                num_rows[item.shape] += item.num_rows
            for item in ranked:
                rows_each = -(-num_rows[item.shape] // self._num_replicas)
                own = item.num_steps_left * item.num_rows * self._costs.row_seconds(item.shape, item.volume, rows_each)
                total += own
                left[item.request_id] = max(own, total / self._num_replicas)
            return left

    def schedule(self, max_batch_size: int) -> tuple[WorkerCommand, list[ScheduledRequest]]:
        """The next round of work, and the requests that were aborted since the last one."""
        with self._lock:
            aborted, release = self._take_aborted()
            # One at a time, and before any step: its client need not wait for a step of others.
            done = [key for key, item in self._running.items() if not item.num_steps_left][: self._num_replicas]
            group = [] if done else self._next_group(max_batch_size)
            begun = [item for item in group if item.request_id in self._waiting]
            for item in begun:
                self._running[item.request_id] = self._waiting.pop(item.request_id)
        command = WorkerCommand(
            release=tuple(release),
            prepare=tuple(item.request for item in begun),
            decode=tuple(done),
            step=tuple(item.request_id for item in group),
            max_batch_size=max_batch_size,
            measure=self._should_measure(group, done),
        )
        return command, aborted

    def update(self, command: WorkerCommand, result: WorkerResult) -> list[ScheduledRequest]:
        """Take in what became of a round. Returns the requests that advanced by a step."""
        with self._lock:
            taking_part = {key: self._running[key] for key in (*command.step, *command.decode)}
            for request_id in (*result.finished, *result.errors):
                del self._running[request_id]
                self._aborted.discard(request_id)
            advanced = [self._running[key] for key in command.step if key in self._running]
            if advanced and result.step_s is not None:
                self._account([taking_part[key] for key in command.step], result.step_s)
            for item in advanced:
                item.step += 1
            if result.memory is not None:
                self._learn_memory(command, result, taking_part)
            if result.finished or result.errors:
                self._ranking = None
            if not self._running and not self._waiting:
                self._served_clients.clear()
        return advanced

    def fail_running(self) -> list[ScheduledRequest]:
        """Take out the requests that workers hold, after a failure of the workers. Those that wait stay."""
        with self._lock:
            failed = list(self._running.values())
            self._lost += self._running
            self._aborted -= self._running.keys()
            self._running.clear()
            self._ranking = None
            return failed

    def clear(self) -> list[str]:
        """Forget everything, after a failure that no request caused. Returns the ids of all that was in hand."""
        with self._lock:
            cleared = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
            self._aborted.clear()
            self._ranking = None
            return cleared

    def _all(self) -> list[ScheduledRequest]:
        return [*self._running.values(), *self._waiting.values()]

    def _ranked(self) -> list[ScheduledRequest]:
        """All requests in the order of the policy, which is kept for a moment: steps may be short and queues long."""
        now = time.monotonic()
        if self._ranking is None or now - self._ranked_at > _SECONDS_OF_A_RANKING:
            step_seconds = functools.lru_cache(None)(self._costs.step_seconds)
            moment = Moment(
                now=now,
                step_seconds=lambda item: step_seconds(item.shape, item.volume, item.num_rows),
                served_clients=self._served_clients,
            )
            self._ranking = sorted(self._all(), key=lambda item: rank(self._policy, item, moment))
            self._ranked_at = now
        return self._ranking

    def _next_group(self, max_batch_size: int) -> list[ScheduledRequest]:
        """The requests that step together: the first of the ranking that may run, and others that share its step."""
        ranked = self._ranked()
        leader: ScheduledRequest | None = None
        group: list[ScheduledRequest] = []
        num_rows = limit = 0
        may_begin = True
        for item in ranked:
            if leader is not None and (item.shape != leader.shape or num_rows + item.num_rows > limit):
                continue
            if item.request_id in self._waiting:
                # One that cannot begin keeps those behind it from beginning, so that its turn comes.
                may_begin = may_begin and self._has_room(group, item)
                if not may_begin:
                    continue
            if leader is None:
                leader = item
                limit = self._rows_together(leader, ranked, max_batch_size)
            group.append(item)
            num_rows += item.num_rows
        return group

    def _has_room(self, group: list[ScheduledRequest], item: ScheduledRequest) -> bool:
        running = [*self._running.values(), *(other for other in group if other.request_id in self._waiting)]
        return len(running) < self._max_num_seqs and self._budget.fits(running, item)

    def _rows_together(self, leader: ScheduledRequest, ranked: list[ScheduledRequest], max_batch_size: int) -> int:
        """Most rows of a round, of all replicas together."""
        if not leader.can_share:
            return self._num_replicas * leader.num_rows
        there = sum(item.num_rows for item in ranked if item.shape == leader.shape)
        most = max(leader.num_rows, min(-(-there // self._num_replicas), max_batch_size))
        best = most
        if self._measured_batches:
            best = self._costs.best_rows(leader.shape, leader.volume, leader.num_rows, most)
        return self._num_replicas * self._budget.rows_that_fit(self._running.values(), leader, best)

    def _rows_each(self, group: list[ScheduledRequest]) -> int:
        """Rows of the replica that has the most of a round, where they are spread evenly."""
        counts = [item.num_rows for item in group]
        return max(*counts, -(-sum(counts) // self._num_replicas))

    def _should_measure(self, group: list[ScheduledRequest], done: list[str]) -> bool:
        """Measuring costs a little, so each kind of work is measured a few times."""
        if group:
            return self._costs.is_new(group[0].shape, self._rows_each(group))
        return any(not self._budget.is_measured("decode", output_volume(self._running[key])) for key in done)

    def _account(self, group: list[ScheduledRequest], seconds: float) -> None:
        num_rows = sum(item.num_rows for item in group)
        self._costs.observe(group[0].shape, group[0].volume, self._rows_each(group), seconds)
        for item in group:
            item.served_s += seconds
            self._served_clients[item.client] += seconds * item.num_rows / num_rows

    def _learn_memory(
        self, command: WorkerCommand, result: WorkerResult, taking_part: dict[str, ScheduledRequest]
    ) -> None:
        memory = result.memory
        assert memory is not None, "the caller looked"
        for request_id, num_bytes in memory.state_bytes.items():
            self._budget.observe("state", output_volume(taking_part[request_id]), num_bytes)
        if command.step:
            group = [taking_part[key] for key in command.step]
            volume = group[0].volume * self._rows_each(group)
            self._budget.observe("step", volume, memory.peak_bytes)
            self._budget.observe("peers", volume, memory.peer_bytes)
        for key in command.decode:
            self._budget.observe("decode", output_volume(taking_part[key]), memory.peak_bytes)
        self._budget.observe_free(memory.free_bytes + memory.peer_bytes, self._running.values())

    def _take_aborted(self) -> tuple[list[ScheduledRequest], list[str]]:
        """Aborted requests, and the ids of those that workers may hold a state of."""
        release, self._lost = self._lost, []
        release += [key for key in self._running if key in self._aborted]
        if self._aborted:
            self._ranking = None
        aborted = [(self._running if key in self._running else self._waiting).pop(key) for key in self._aborted]
        self._aborted.clear()
        return aborted, release
