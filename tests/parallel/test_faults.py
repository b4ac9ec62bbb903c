"""A rank that dies, hangs or runs out of memory: errors that name it within 10 seconds, and then the next request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.parallel.faulty import assert_named_when_it_hangs, assert_serves, faulty_folder, params
from vllm_omni import Omni
from vllm_omni.diffusion.engine import mp_executor, rank_pool
from vllm_omni.diffusion.engine.rank_pool import RankPool
from vllm_omni.errors import GenerationError, InsufficientMemoryError, InvalidRequestError, RankFailureError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def omni(folder_of_class):
    """Two ranks that split a sequence, of a pipeline that can be told to fail."""
    folder = faulty_folder(folder_of_class)
    with Omni(str(folder), device="cpu", ulysses_degree=2) as omni:
        yield omni


@pytest.fixture(scope="module")
def expected(omni):
    return omni.generate("a red circle", params())[0].images[0]


def pids(omni):
    return omni._engine._executor.pids


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ("die 1", r"rank 1 of 2 was killed by SIGKILL"),
        pytest.param("die 0", r"rank 0 of 2 was killed by SIGKILL", marks=pytest.mark.parallel),
        pytest.param("hang 1", r"rank 1 of 2 hangs", marks=pytest.mark.parallel),
        pytest.param("oom 1", r"rank 1 of 2 failed: .*out of memory", marks=pytest.mark.parallel),
        pytest.param("fail 0", r"rank 0 of 2 failed: ArithmeticError: this rank", marks=pytest.mark.parallel),
    ],
)
def test_a_rank_that_fails_in_a_step_is_named_and_the_next_request_succeeds(omni, expected, prompt, cause):
    old = pids(omni)
    started = time.monotonic()
    with pytest.raises(GenerationError) as caught:
        omni.generate([prompt, "a blue square"], params())
    assert time.monotonic() - started < 10
    # Also the request that had no part in it: its state is gone.
    assert [type(output.error) for output in caught.value.outputs] == [RankFailureError] * 2
    assert caught.match(cause)
    assert_serves(omni, expected)
    assert not any(alive(pid) for pid in old)
    assert_serves(omni, expected)


@pytest.mark.parallel
def test_a_rank_that_is_stopped_is_named_and_the_next_request_succeeds(omni, expected):
    started = time.monotonic()
    with pytest.raises(GenerationError, match="rank 1 of 2 has given no sign of life"):
        omni.generate("stop 1", params())
    assert time.monotonic() - started < 10
    assert_serves(omni, expected)


def test_a_signal_to_end_that_reaches_the_ranks_too_ends_no_rank(omni, expected):
    old = pids(omni)
    for pid in old:
        os.kill(pid, signal.SIGTERM)
    assert_serves(omni, expected)
    assert pids(omni) == old


@pytest.mark.parallel
def test_a_rank_that_is_killed_at_rest_starts_again_before_a_request_needs_it(omni, expected):
    old, engine = pids(omni), omni._engine
    os.kill(old[1], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while engine.num_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.is_alive
    while not engine.num_ready:
        assert time.monotonic() < deadline + 30
        time.sleep(0.01)
    assert not set(pids(omni)) & set(old)
    assert_serves(omni, expected)


@pytest.mark.parallel
def test_ranks_start_again_without_waiting_for_a_request(omni, expected):
    with pytest.raises(GenerationError, match="rank 1 of 2 was killed"):
        omni.generate("die 1", params())
    executor = omni._engine._executor
    deadline = time.monotonic() + 30
    while not executor.num_ready and time.monotonic() < deadline:
        time.sleep(0.1)
    assert executor.num_ready
    assert_serves(omni, expected)


@pytest.mark.parallel
def test_a_replica_of_one_rank_that_hangs_is_named_though_no_rank_waits_for_it(omni):
    with Omni(omni._engine.od_config.model, device="cpu", data_parallel_size=2) as replicas:
        started = time.monotonic()
        with pytest.raises(GenerationError, match=r"rank 0 of 2 hangs") as caught:
            replicas.generate(["hang 0", "a red circle"], params())
        assert time.monotonic() - started < 10
        assert caught.value.outputs[1].finished


@pytest.mark.parallel
@pytest.mark.parametrize(
    "options",
    [
        {"use_hsdp": True, "hsdp_shard_size": 2},
        {"tensor_parallel_size": 2, "enforce_eager": False},
        {"ulysses_degree": 2, "enforce_eager": False},
    ],
    ids=["hsdp", "tp-compiled", "ulysses-compiled"],
)
def test_a_rank_is_named_in_whatever_way_the_others_wait_for_it(omni, options):
    assert_named_when_it_hangs(omni._engine.od_config.model, device="cpu", **options)


@pytest.mark.parametrize("limit", ["_SILENT_START_S", "_SILENT_LOAD_S"])
def test_a_rank_that_is_stopped_while_it_starts_is_named(qwen_folder, monkeypatch, limit):
    def stop(rank):
        if rank.number == 1:
            os.kill(rank.handle.pid, signal.SIGSTOP)
            rank.has_beaten = limit == "_SILENT_LOAD_S"
        return rank

    start = RankPool._start
    monkeypatch.setattr(RankPool, "_start", lambda *args: map(stop, start(*args)))
    monkeypatch.setattr(rank_pool, limit, 1.0)
    with pytest.raises(RankFailureError, match=r"rank [01] of 2 has given no sign of life for 1 s while it"):
        Omni(str(qwen_folder), device="cpu", ulysses_degree=2)


def test_a_request_that_is_wrong_on_all_ranks_alike_restarts_nothing(omni, expected):
    old = pids(omni)
    with pytest.raises(InvalidRequestError) as caught:
        omni.generate("a cat holding a sign that says hello", params(max_sequence_length=3))
    assert caught.value.param == "prompt"
    assert pids(omni) == old
    assert_serves(omni, expected)


def test_a_picture_that_cannot_be_decoded_costs_its_request_alone(omni):
    old = pids(omni)
    with pytest.raises(GenerationError, match="out of memory") as caught:
        omni.generate(["no decoding", "a red circle"], params(output_type="np"))
    failed, finished = caught.value.outputs
    assert isinstance(failed.error, InsufficientMemoryError)
    assert finished.finished
    assert pids(omni) == old


def test_a_wrong_request_beside_a_preview_that_takes_long_costs_nothing(omni, monkeypatch):
    old, engine = pids(omni), omni._engine
    monkeypatch.setattr(mp_executor, "_GRACE_S", 0.6)
    monkeypatch.setattr(engine, "_needs_preview", lambda *_: True)
    slow = engine.add_request(engine.validate("slow decoding", params()))
    wrong = engine.add_request(engine.validate("a cat holding a sign", params(max_sequence_length=3)))
    outputs = {}
    while engine.has_requests:
        outputs |= {output.request_id: output for output in engine.step().outputs}
    assert outputs[slow].finished
    assert isinstance(outputs[wrong].error, InvalidRequestError)
    assert pids(omni) == old


@pytest.mark.parallel
def test_ranks_that_fail_again_and_again_are_given_up(omni, expected):
    executor = omni._engine._executor
    executor._num_restarts, before = 3, executor._num_restarts
    try:
        with pytest.raises(GenerationError, match=r"rank 0 of 2 was killed"):
            omni.generate("die 0", params())
        started = time.monotonic()
        with pytest.raises(GenerationError, match=r"4 times in a row.*create the engine anew"):
            omni.generate("a red circle", params())
        assert time.monotonic() - started < 1
    finally:
        executor._num_restarts, executor._end = before, None
    assert_serves(omni, expected)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gone_within(processes, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in processes):
            return True
        time.sleep(0.1)
    return False


SCRIPT = """
import signal, sys
from vllm_omni import Omni, OmniDiffusionSamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: shells let background jobs ignore it
omni = Omni(device="cpu", **{sys.argv[1]: 2})
executor = omni._engine._executor
print(*[pid for each in getattr(executor, "replicas", [executor]) for pid in each.pids], flush=True)
params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=10_000)
omni.generate("a red circle", params, progress=lambda event: event.step == 1 and print("begun", flush=True))
"""


@pytest.fixture
def running(request):
    """A script in the middle of a generation on two ranks, and the ranks' process ids."""
    option = getattr(request, "param", "cfg_parallel_size")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), option],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    ranks = [int(pid) for pid in process.stdout.readline().split()]
    assert len(ranks) == 2
    assert process.stdout.readline() == "begun\n"
    yield process, ranks
    process.kill()
    process.communicate()


def test_an_interrupt_ends_everything_and_leaves_nothing(running):
    process, ranks = running
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the ranks as well
    _, stderr = process.communicate(timeout=5)
    assert time.monotonic() - started < 5
    assert "KeyboardInterrupt" in stderr
    assert "rank_process" not in stderr, "the ranks left the interrupt to the engine"
    assert gone_within(ranks, 1)
    assert set(os.listdir("/dev/shm")) <= before  # noqa: PTH208


@pytest.mark.parallel
@pytest.mark.parametrize("running", ["cfg_parallel_size", "data_parallel_size"], indirect=True)
def test_an_interrupt_waits_for_no_step(running):
    process, ranks = running
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert "KeyboardInterrupt" in stderr
    assert gone_within(ranks, 1)


@pytest.mark.parallel
def test_an_engine_that_is_stopped_with_its_ranks_goes_on_with_them(running):
    process, ranks = running
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(2)
    assert process.poll() is None
    assert all(alive(rank) for rank in ranks)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert "KeyboardInterrupt" in stderr
    assert "no sign of life" not in stderr


@pytest.mark.parallel
def test_ranks_end_with_an_engine_that_is_killed(running):
    process, ranks = running
    process.kill()
    assert gone_within(ranks, 5)
