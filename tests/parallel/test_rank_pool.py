"""The pool of ranks that tests and measurements run on: a rank that hangs or fails is said, with where it stands."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from benchmarks.rank_pool import RankPool

pytestmark = pytest.mark.parallel


def hang_on_the_second():
    if dist.get_rank() == 1:
        time.sleep(100)
    dist.barrier()


def fail_on_the_second():
    if dist.get_rank() == 1:
        raise ArithmeticError("this rank counts otherwise")
    dist.barrier()


@pytest.mark.parametrize(
    ("function", "messages"),
    [
        (hang_on_the_second, [r"ranks \[0, 1\] of 2 gave no answer", "in hang_on_the_second", "in barrier"]),
        (fail_on_the_second, ["rank 1: .*ArithmeticError: this rank counts", "rank 0 stands at", "in barrier"]),
    ],
)
def test_a_pool_says_where_its_ranks_stand(function, messages):
    pool = RankPool(2)
    pool.run(dist.get_rank)
    with pytest.raises(AssertionError) as caught:
        pool.run(function, timeout_s=3)
    for message in messages:
        caught.match(rf"(?s){message}")
    assert not any(process.is_alive() for process in pool._processes)
