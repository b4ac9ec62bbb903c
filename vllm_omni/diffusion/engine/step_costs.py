"""What a step costs, per shape and number of rows, measured while the engine works.

A row is one output of one branch of a request: what a forward is made of. Costs of unlike numbers of rows are kept in
buckets of powers of two.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

# Below this many pixels of an output (all frames) a forward does not fill a large GPU, so that a batch is tried before
# anything is known. 512 x 512 gains about 3x on an H200, 1024 x 1024 nothing.
_SMALL_VOLUME = 768 * 768
# A larger batch makes each of its requests wait for the others: it must give at least so much more throughput.
_LEAST_GAIN = 1.03
_NUM_SAMPLES = 7
# The first step of a size is slow, as memory is taken and kernels are chosen, so one says nothing yet.
_LEAST_SAMPLES = 2
# Every so many rounds of a shape, the last few try a batch of another size: what was slow may have been bad luck.
_ROUNDS_BETWEEN_TRIALS = 200


@dataclass
class _Shape:
    volume: int
    num_rounds: int = 0
    samples: dict[int, deque[float]] = field(default_factory=dict)  # by bucket: seconds per row


def bucket_of(num_rows: int) -> int:
    """The least power of two that is not below ``num_rows``."""
    return 1 << (num_rows - 1).bit_length()


class StepCosts:
    """Learns from each round and answers what the next may cost."""

    def __init__(self) -> None:
        self._shapes: dict[Hashable, _Shape] = {}
        self._row_seconds_per_pixel = 1e-7  # of the last round; before the first only ratios matter

    def observe(self, shape: Hashable, volume: int, num_rows: int, seconds: float) -> None:
        """A step of ``num_rows`` rows of ``volume`` pixels each took ``seconds``."""
        known = self._shapes.setdefault(shape, _Shape(volume))
        known.num_rounds += 1
        known.samples.setdefault(bucket_of(num_rows), deque(maxlen=_NUM_SAMPLES)).append(seconds / num_rows)
        self._row_seconds_per_pixel = seconds / num_rows / volume

    def is_new(self, shape: Hashable, num_rows: int) -> bool:
        """Whether few steps of this shape and size were measured."""
        known = self._shapes.get(shape)
        return known is None or len(known.samples.get(bucket_of(num_rows), ())) < _LEAST_SAMPLES

    def row_seconds(self, shape: Hashable, volume: int, num_rows: int) -> float:
        """Seconds of a row in a step of ``num_rows`` rows; from the nearest that was measured if this never was."""
        known = self._shapes.get(shape)
        if known is None:
            return self._row_seconds_per_pixel * volume
        bucket = bucket_of(num_rows)
        nearest = min(known.samples, key=lambda measured: abs(measured.bit_length() - bucket.bit_length()))
        return statistics.median(known.samples[nearest])

    def step_seconds(self, shape: Hashable, volume: int, num_rows: int) -> float:
        """Seconds of a step."""
        return num_rows * self.row_seconds(shape, volume, num_rows)

    def best_rows(self, shape: Hashable, volume: int, least: int, most: int) -> int:
        """How many rows to step together: the fewest that come near the best throughput.

        ``least`` are those of one request, ``most`` those that are there.
        """
        if most <= least:
            return least
        buckets = _buckets(least, most)
        known = self._shapes.get(shape)
        if known is None:
            return most if volume < _SMALL_VOLUME else least
        unknown = [bucket for bucket in buckets if self.is_new(shape, bucket)]
        # What disturbs a step, as a server's other threads do, makes it slower, so the fastest tells the most.
        measured = {bucket: min(known.samples[bucket]) for bucket in buckets if bucket not in unknown}
        is_trial = known.num_rounds % _ROUNDS_BETWEEN_TRIALS >= _ROUNDS_BETWEEN_TRIALS - _LEAST_SAMPLES
        if unknown and (volume < _SMALL_VOLUME or is_trial):
            return min(unknown[-1], most)
        best = buckets[0]
        for bucket in buckets:
            if bucket in measured and measured[bucket] * _LEAST_GAIN < measured.get(best, float("inf")):
                best = bucket
        if is_trial:
            index = buckets.index(best)
            best = buckets[index + 1 if index + 1 < len(buckets) else index - 1]
        return max(least, min(best, most))


def _buckets(least: int, most: int) -> list[int]:
    """Powers of two from that of ``least`` to that of ``most``."""
    buckets = [bucket_of(least)]
    while buckets[-1] < most:
        buckets.append(2 * buckets[-1])
    return buckets
