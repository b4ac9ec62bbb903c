"""Load: which requests come when, sending them, and what became of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class RequestError(Exception):
    """A request that got no result. ``kind`` is what is counted, as in "429 queue_full"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class RequestGroup:
    """A share of the requests, alike in what they ask for."""

    name: str
    weight: float
    task: str
    fields: dict[str, Any]  # of the request's body
    slo_s: float | None = None  # seconds within which a request should be done


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request, and when it comes: seconds after the start."""

    index: int
    group: RequestGroup
    arrival_s: float


@dataclass(frozen=True, kw_only=True)
class RequestSample:
    """What became of a request. Seconds are counted from the start of the load.

    The latency of an open loop is counted from when the request came, not from when a place was free to send it:
    otherwise a slow server would hide its own queue.
    """

    group: str
    arrival_s: float
    sent_s: float
    finished_s: float
    num_outputs: int
    error: str | None = None
    error_message: str | None = None

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrival_s


def plan_requests(
    groups: Sequence[RequestGroup], num_requests: int, rate: float, burstiness: float, seed: int
) -> list[PlannedRequest]:
    """Requests of the groups by their weights, in random order.

    ``rate`` is the mean number of arrivals per second; infinite means that all are there at once. Gaps are drawn from
    a gamma distribution of shape ``burstiness``: 1 is a Poisson process, less comes in bursts, more is more even.
    """
    generator = np.random.default_rng(seed)
    weights = np.array([group.weight for group in groups])
    chosen = generator.choice(len(groups), num_requests, p=weights / weights.sum())
    gaps = np.zeros(num_requests)
    if np.isfinite(rate):
        gaps = generator.gamma(burstiness, 1 / (rate * burstiness), num_requests)
        gaps[0] = 0.0
    arrivals = np.cumsum(gaps)
    return [
        PlannedRequest(index=i, group=groups[choice], arrival_s=float(arrival))
        for i, (choice, arrival) in enumerate(zip(chosen, arrivals, strict=True))
    ]


def run_load(
    planned: Sequence[PlannedRequest],
    send: Callable[[PlannedRequest], int],
    max_concurrency: int | None,
    on_finished: Callable[[RequestSample], object] = lambda _: None,
) -> list[RequestSample]:
    """Send each request when it comes, and wait for all. ``send`` returns the number of outputs or raises
    ``RequestError``.

    With ``max_concurrency`` at most so many are under way. Requests that are all there at once then make a closed loop
    of so many clients: the arrival of each is when its place is free.
    """
    places = threading.Semaphore(len(planned) if max_concurrency is None else max_concurrency)
    is_closed_loop = max_concurrency is not None and all(request.arrival_s == 0 for request in planned)
    samples: list[RequestSample] = []
    lock = threading.Lock()
    started = time.perf_counter()

    def carry_out(request: PlannedRequest) -> None:
        sent_s = time.perf_counter() - started
        num_outputs, error, message = 0, None, None
        try:
            num_outputs = send(request)
        except RequestError as caught:
            error, message = caught.kind, str(caught)
        finally:
            finished_s = time.perf_counter() - started
            places.release()
        sample = RequestSample(
            group=request.group.name,
            arrival_s=sent_s if is_closed_loop else request.arrival_s,
            sent_s=sent_s,
            finished_s=finished_s,
            num_outputs=num_outputs,
            error=error,
            error_message=message,
        )
        with lock:
            samples.append(sample)
            on_finished(sample)

    threads = []
    for request in planned:
        time.sleep(max(0.0, started + request.arrival_s - time.perf_counter()))
        places.acquire()
        threads.append(threading.Thread(target=carry_out, args=(request,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return samples
