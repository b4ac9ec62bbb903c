"""How much memory requests need, learned from those that ran, so that none is begun that would not fit.

A request holds its state from its first step to its last. On top of all states comes what one piece of work needs while
it lasts: a step of a batch, or a decoding. Both grow with the number of pixels. So does the memory that ranks write to
each other in a step; it is kept for later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from vllm_omni.diffusion.engine.policies import ScheduledRequest

Kind = Literal["state", "step", "decode", "peers"]

# Allocators keep pieces that fit nothing, so not all that is free can be used.
_USABLE = 0.9
# How far up a measurement is extrapolated.
_FURTHEST = 4


class MemoryBudget:
    """Sizes in bytes, volumes in pixels of all rows or outputs together.

    ``is_cautious``: until something was measured, a request begins only when no other is in progress.
    """

    def __init__(self, limit_bytes: int | None = None, *, is_cautious: bool = True) -> None:
        self._limit = limit_bytes
        self._is_cautious = is_cautious
        self._capacity: float | None = limit_bytes
        self._measured: dict[Kind, dict[int, int]] = {"state": {}, "step": {}, "decode": {}, "peers": {}}
        self._num_measured = Counter[tuple[Kind, int]]()

    def observe(self, kind: Kind, volume: int, num_bytes: int) -> None:
        """Work or a state of ``volume`` pixels took ``num_bytes``.

        The last measurement counts: the first also pays for what libraries set up once.
        """
        self._measured[kind][volume] = num_bytes
        self._num_measured[kind, volume] += 1

    def observe_free(self, free_bytes: int, running: Iterable[ScheduledRequest]) -> None:
        """The device has ``free_bytes`` left beside the states of the ``running`` requests, that of peers included."""
        if self._limit is None:
            self._capacity = _USABLE * (free_bytes + self._states(running))

    def is_measured(self, kind: Kind, volume: int) -> bool:
        return self._num_measured[kind, volume] > 1

    def fits(self, running: Iterable[ScheduledRequest], candidate: ScheduledRequest) -> bool:
        """Whether ``candidate`` can join. Alone it can in any case: running it is how its need is measured.

        One that runs and is reckoned to need more than there is, as a video whose decoding has only been measured on
        pictures, keeps nobody out who fits beside its state.
        """
        running = list(running)
        if not running:
            return True
        if self._capacity is None or not self._measured["state"]:
            return not self._is_cautious
        most, states = max(self._work(item) for item in running), self._states(running)
        if states + most > self._capacity:
            most = 0.0
        added = self._states([candidate])
        return states + added + max(most, self._work(candidate)) <= self._capacity

    def rows_that_fit(self, running: Iterable[ScheduledRequest], leader: ScheduledRequest, num_rows: int) -> int:
        """At most ``num_rows``, and at least those of ``leader``, so that a step of so many rows fits."""
        if self._capacity is not None:
            left = self._capacity - self._states(running)
            while num_rows > leader.num_rows and self._step(leader.volume * num_rows) > left:
                num_rows = max(leader.num_rows, num_rows // 2)
        return num_rows

    def shortage(self, candidate: ScheduledRequest) -> tuple[float, float] | None:
        """Needed and available bytes of a request that would not fit even alone; None if it would.

        From far below, what is fixed counts many times. So one that is further away is held to need as much as the
        largest that can be judged, which is the least that it needs.
        """
        if self._capacity is None or not self._measured["state"]:
            return None
        volume = output_volume(candidate)
        share = min(1.0, _FURTHEST * max(self._measured["state"]) / volume)
        needed = self._estimate("state", share * volume) + self._work(candidate, share)
        return None if needed <= self._capacity else (needed, self._capacity)

    def _states(self, requests: Iterable[ScheduledRequest]) -> float:
        return sum(self._estimate("state", output_volume(item)) for item in requests)

    def _work(self, item: ScheduledRequest, share: float = 1.0) -> float:
        step, decode = share * item.volume * item.num_rows, share * output_volume(item)
        return max(self._step(step), self._estimate("decode", decode) + self._held_for_peers)

    def _step(self, volume: float) -> float:
        return self._estimate("step", volume) + max(self._held_for_peers, self._estimate("peers", volume))

    @property
    def _held_for_peers(self) -> int:
        return max(self._measured["peers"].values(), default=0)

    def _estimate(self, kind: Kind, volume: float) -> float:
        """In proportion to the nearest measured volume, and never less than a smaller one took."""
        known = self._measured[kind]
        if not known:
            return 0.0
        nearest = min(known, key=lambda measured: abs(measured - volume))
        return known[nearest] * max(1.0, volume / nearest)


def output_volume(item: ScheduledRequest) -> int:
    """Pixels of all outputs of a request."""
    return item.volume * item.request.num_outputs
