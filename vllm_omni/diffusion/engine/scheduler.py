"""Which requests take the next denoising step.

First come, first served: up to ``max_num_seqs`` requests are in progress, and all of them advance in every round.
Requests join and leave between any two steps.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import WorkerCommand, WorkerResult


@dataclass(kw_only=True)
class ScheduledRequest:
    """A request and how far it is. ``num_steps`` is 1 for a pipeline that runs in one piece."""

    request: OmniDiffusionRequest
    num_steps: int
    step: int = 0


class Scheduler:
    """Keeps waiting and running requests in order. ``abort`` may be called from any thread, the rest from one."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[ScheduledRequest] = deque()
        self._running: dict[str, ScheduledRequest] = {}
        self._aborted: set[str] = set()
        self._lost: list[str] = []  # failed, while workers may still hold their states
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

    def num_steps_left_of(self, request_id: str) -> int | None:
        with self._lock:
            for item in (*self._running.values(), *self._waiting):
                if item.request.request_id == request_id:
                    return item.num_steps - item.step
        return None

    @property
    def num_steps_left(self) -> int:
        """Of all requests together."""
        with self._lock:
            return sum(item.num_steps - item.step for item in (*self._waiting, *self._running.values()))

    def add(self, scheduled: ScheduledRequest) -> None:
        with self._lock:
            self._waiting.append(scheduled)

    def abort(self, request_id: str) -> bool:
        """End a request before its next step. False if it is not in progress."""
        with self._lock:
            known = request_id in self._running or any(
                scheduled.request.request_id == request_id for scheduled in self._waiting
            )
            if known:
                self._aborted.add(request_id)
            return known

    def schedule(self, max_batch_size: int) -> tuple[WorkerCommand, list[ScheduledRequest]]:
        """The next round of work, and the requests that were aborted since the last one."""
        with self._lock:
            aborted, release = self._take_aborted()
            admitted = []
            while self._waiting and len(self._running) < self._max_num_seqs:
                scheduled = self._waiting.popleft()
                self._running[scheduled.request.request_id] = scheduled
                admitted.append(scheduled.request)
            decode = [key for key, scheduled in self._running.items() if scheduled.step == scheduled.num_steps]
            step = [key for key, scheduled in self._running.items() if scheduled.step < scheduled.num_steps]
        command = WorkerCommand(
            release=tuple(release),
            prepare=tuple(admitted),
            decode=tuple(decode),
            step=tuple(step),
            max_batch_size=max_batch_size,
        )
        return command, aborted

    def update(self, command: WorkerCommand, result: WorkerResult) -> list[ScheduledRequest]:
        """Take in what became of a round. Returns the requests that advanced by a step."""
        with self._lock:
            for request_id in (*result.finished, *result.errors):
                del self._running[request_id]
                self._aborted.discard(request_id)
            advanced = [self._running[key] for key in command.step if key in self._running]
            for scheduled in advanced:
                scheduled.step += 1
        return advanced

    def next_step(self, request_id: str) -> tuple[int, int]:
        """The step that a running request takes next, and the number of its steps."""
        scheduled = self._running[request_id]
        return scheduled.step + 1, scheduled.num_steps

    def fail_running(self) -> list[ScheduledRequest]:
        """Take out the requests that workers hold, after a failure of the workers. Those that wait stay."""
        with self._lock:
            failed = list(self._running.values())
            self._lost += self._running
            self._running.clear()
            return failed

    def clear(self) -> list[str]:
        """Forget everything, after a failure that no request caused. Returns the ids of all that was in hand."""
        with self._lock:
            cleared = [scheduled.request.request_id for scheduled in self._waiting] + list(self._running)
            self._waiting.clear()
            self._running.clear()
            self._aborted.clear()
            return cleared

    def _take_aborted(self) -> tuple[list[ScheduledRequest], list[str]]:
        """Aborted requests, and the ids of those that workers may hold a state of."""
        lost, self._lost = self._lost, []
        if not self._aborted:
            return [], lost
        waiting = [scheduled for scheduled in self._waiting if scheduled.request.request_id in self._aborted]
        self._waiting = deque(scheduled for scheduled in self._waiting if scheduled not in waiting)
        release = [key for key in self._running if key in self._aborted]
        running = [self._running.pop(key) for key in release]
        self._aborted.clear()
        return waiting + running, lost + release
