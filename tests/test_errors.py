"""Errors that travel between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from vllm_omni import errors
from vllm_omni.errors import OmniError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OmniError)]
ATTRIBUTES = {"param": "height", "option": "device", "outputs": [1], "rank": 1, "retry_after_s": 2.5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_an_error_arrives_with_its_message_and_all_that_it_tells(kind, through):
    required = [name for name in ATTRIBUTES if name in inspect.getfullargspec(kind.__init__).kwonlyargs]
    error = kind("height=7 is odd; give a multiple of 16", **{name: ATTRIBUTES[name] for name in required})
    got = through(error)
    assert type(got) is kind
    assert str(got) == "height=7 is odd; give a multiple of 16"
    assert vars(got) == vars(error)
    assert {name: getattr(got, name) for name in required} == {name: ATTRIBUTES[name] for name in required}


def test_a_rank_failure_tells_its_summary_and_its_detail_apart():
    got = pickle.loads(pickle.dumps(errors.RankFailureError("rank 1 of 2 failed", rank=1, detail="OSError: /x")))
    assert (str(got), got.summary, got.rank) == ("rank 1 of 2 failed: OSError: /x", "rank 1 of 2 failed", 1)
