"""Who takes the next step, with costs that a test makes up."""

from __future__ import annotations

import itertools
import types

import pytest

from vllm_omni.diffusion.engine import scheduler as scheduler_module
from vllm_omni.diffusion.engine.memory_budget import MemoryBudget
from vllm_omni.diffusion.engine.policies import ScheduledRequest
from vllm_omni.diffusion.engine.scheduler import Scheduler
from vllm_omni.diffusion.engine.step_costs import StepCosts
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.messages import MemoryUse, StageTimes, WorkerOutput, WorkerResult
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

MB = 2**20


class Clock:
    """The scheduler's time, which only the simulated device advances."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        # Not the function of the module time itself: event loops of other threads live by it.
        monkeypatch.setattr(scheduler_module, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(scheduler_module, "_SECONDS_OF_A_RANKING", 0.0)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def request(name, side=512, steps=10, num_rows=1, **placing):
    params = OmniDiffusionSamplingParams(height=side, width=side, num_inference_steps=steps, num_outputs_per_prompt=1)
    made = OmniDiffusionRequest(prompts=[{"prompt": name}], sampling_params=params, request_id=name)
    return ScheduledRequest(request=made, num_steps=steps, num_rows=num_rows, **placing)


class Device:
    """Carries out commands in simulated time: ``seconds(side, rows)`` for a step, nothing for the rest."""

    def __init__(self, scheduler, clock, seconds, max_batch_size=16, bytes_per_pixel=(0, 0), free_bytes=0):
        self.scheduler, self.clock, self.seconds = scheduler, clock, seconds
        self.max_batch_size, self.bytes_per_pixel, self.free_bytes = max_batch_size, bytes_per_pixel, free_bytes
        self.items = {}
        self.finished_at = {}
        self.steps = []  # the group of each round of steps

    def add(self, *items):
        for item in items:
            self.items[item.request_id] = item
            self.scheduler.add(item)

    def round(self):
        command, aborted = self.scheduler.schedule(self.max_batch_size)
        result = WorkerResult()
        for request_id in command.decode:
            result.finished[request_id] = WorkerOutput(output=None, times=StageTimes(), peak_memory_bytes=0)
            self.finished_at[request_id] = self.clock.now
        if command.step:
            group = [self.items[key] for key in command.step]
            result.step_s = self.seconds(group[0].shape[0], sum(item.num_rows for item in group))
            self.clock.now += result.step_s
            self.steps.append(command.step)
        if command.measure:
            step, state = self.bytes_per_pixel
            taking_part = [self.items[key] for key in (*command.step, *command.decode)]
            volume = sum(item.volume * item.num_rows for item in taking_part)
            result.memory = MemoryUse(
                peak_bytes=int(step * volume),
                state_bytes={item.request_id: int(state * item.volume) for item in taking_part},
                free_bytes=self.free_bytes,
            )
        self.scheduler.update(command, result)
        return command, aborted

    def run(self):
        for _ in range(100_000):
            if not self.scheduler.has_requests:
                return
            self.round()
        raise AssertionError("it does not end")


def proportional(side, rows):
    """A step takes 0.01 s per row of 512 x 512."""
    return 0.01 * rows * (side / 512) ** 2


def make(clock, policy="shortest", seconds=proportional, budget=None, max_num_seqs=64, **options):
    scheduler = Scheduler(max_num_seqs, policy, budget)
    return Device(scheduler, clock, seconds, **options)


def test_a_short_request_waits_for_at_most_one_step_of_a_long_one(clock):
    device = make(clock)
    device.add(request("long", side=1024, steps=100))
    for _ in range(5):
        device.round()
    came = clock.now
    device.add(request("short", side=768, steps=4))
    device.run()
    assert device.finished_at["short"] - came <= proportional(1024, 1) + 4 * proportional(768, 1) + 1e-9
    assert device.finished_at["long"] > device.finished_at["short"]


def replicas_make(clock, num_replicas, *, measured_batches=True, max_batch_size=16):
    """Replicas that share the rows of a round evenly."""
    scheduler = Scheduler(
        64, budget=MemoryBudget(is_cautious=False), measured_batches=measured_batches, num_replicas=num_replicas
    )
    return Device(
        scheduler, clock, lambda side, rows: proportional(side, rows) / num_replicas, max_batch_size=max_batch_size
    )


@pytest.mark.parametrize(
    ("side", "placing"),
    [(1024, {"num_rows": 2}), (1024, {"num_rows": 2, "can_share": False})],
    ids=["large", "in one piece"],
)
def test_each_replica_takes_a_step_where_a_batch_gains_nothing(clock, side, placing):
    device = replicas_make(clock, 2)
    device.add(*(request(f"r{i}", side=side, steps=10, **placing) for i in range(4)))
    device.run()
    assert {len(step) for step in device.steps} == {2}
    assert len(device.steps) == 20


def test_a_batch_may_be_as_large_as_it_may_be_on_each_replica(clock):
    device = replicas_make(clock, 2, measured_batches=False, max_batch_size=1)
    device.add(*(request(f"r{i}", steps=3) for i in range(3)))
    device.run()
    assert [len(step) for step in device.steps] == [2, 2, 2, 1, 1, 1]
    assert device.finished_at["r0"] == device.finished_at["r1"]


def test_memory_that_ranks_write_to_each_other_counts_for_larger_steps_and_stays_for_all():
    budget = MemoryBudget()
    small, large = request("small", side=512), request("large", side=1024)
    for kind, num_bytes in (("state", 0), ("step", 10 * MB), ("decode", 10 * MB), ("peers", 50 * MB)):
        budget.observe(kind, small.volume, num_bytes)
    budget.observe_free(200 * MB, [])  # 180 are used
    assert budget.shortage(small) is None
    assert budget.shortage(large) == (4 * (10 + 50) * MB, 180 * MB)
    budget.observe("peers", large.volume, 175 * MB)
    assert budget.shortage(small) == ((10 + 175) * MB, 180 * MB)


def test_replicas_share_the_time_that_is_left_but_one_request_takes_its_own(clock):
    device = replicas_make(clock, 2)
    device.add(*(request(f"r{i}", side=1024, steps=10) for i in range(4)))
    device.round()
    left = list(device.scheduler.seconds_left().values())
    row_s = proportional(1024, 1)
    assert left[0] == pytest.approx(9 * row_s)
    assert left[-1] == pytest.approx((9 + 9 + 10 + 10) / 2 * row_s)


def test_first_come_first_served_lets_the_long_one_end_first(clock):
    device = make(clock, "fcfs")
    device.add(request("long", side=1024, steps=50), request("short", side=768, steps=4))
    device.run()
    assert device.finished_at["long"] < device.finished_at["short"]


def test_a_long_request_does_not_starve_among_an_endless_row_of_short_ones(clock):
    device = make(clock)
    device.add(request("long", side=1024, steps=50))
    names = (f"short-{i}" for i in itertools.count())
    while "long" not in device.finished_at:
        while sum(name.startswith("short") for name in device.items) - len(device.finished_at) < 4:
            device.add(request(next(names), side=768, steps=10))
        device.round()
        assert clock.now < 1200, "the long one starves"
    assert len(device.finished_at) > 20, "and the short ones were not held up by it"


def test_fair_shares_time_among_users_however_much_each_asks_for(clock):
    device = make(clock, "fair")
    device.add(*(request(f"greedy-{i}", side=768, steps=20, client="greedy") for i in range(8)))
    device.add(request("modest", side=512, steps=20, client="modest"))
    device.run()
    finished = sorted(device.finished_at, key=device.finished_at.get)
    alone = 20 * proportional(512, 1)
    assert finished.index("modest") <= 1
    assert device.finished_at["modest"] - 1000 <= 2 * alone + proportional(768, 8) + 0.1


def test_fair_counts_no_time_in_which_a_user_asked_for_nothing(clock):
    device = make(clock, "fair", max_batch_size=1)
    device.add(request("busy", steps=100, client="busy"), request("early", steps=2, client="rare"))
    for _ in range(60):
        device.round()
    done = len(device.steps)
    device.add(*(request(f"again-{i}", steps=20, client="rare") for i in range(3)))
    for _ in range(30):
        device.round()
    turns = [name.split("-")[0] for (name,) in device.steps[done:]]
    assert abs(turns.count("again") - turns.count("busy")) <= 4


def test_fair_lets_no_row_of_requests_without_a_user_starve_those_with_one(clock):
    device = make(clock, "fair", max_batch_size=1)
    device.add(request("named", steps=20, client="somebody"))
    names = (f"nobody-{i}" for i in itertools.count())
    while "named" not in device.finished_at:
        while sum(name.startswith("nobody") for name in device.items) - len(device.finished_at) < 2:
            device.add(request(next(names), steps=4))
        device.round()
        assert len(device.steps) < 200, "the named one starves"
    assert len(device.scheduler._served_clients) < 10, "those that left are forgotten"


def test_fair_without_users_takes_turns(clock):
    device = make(clock, "fair", max_batch_size=1)
    device.add(request("a"), request("b"))
    device.run()
    assert device.steps[:6] == [("a",), ("b",)] * 3


@pytest.mark.parametrize("policy", ["shortest", "fair", "fcfs"])
def test_a_lower_number_is_served_earlier_under_every_policy(clock, policy):
    device = make(clock, policy)
    device.add(request("usual", side=512, steps=5), request("urgent", side=1024, steps=50, priority=-1))
    device.run()
    assert device.finished_at["urgent"] < device.finished_at["usual"]


def test_a_priority_can_change_while_a_request_waits(clock):
    device = make(clock, "fcfs", max_batch_size=1)
    device.add(request("first"), request("second"))
    device.round()
    assert device.scheduler.set_priority("second", -1)
    device.run()
    assert device.finished_at["second"] < device.finished_at["first"]
    assert not device.scheduler.set_priority("second", 0)


def test_a_deadline_that_is_near_goes_before_shorter_work(clock):
    device = make(clock)
    device.add(request("short", side=768, steps=20), request("due", side=1024, steps=20))
    device.round()  # so that costs are known
    device.items["due"].deadline = clock.now + 20 * proportional(1024, 1) + 0.1
    device.run()
    assert device.finished_at["due"] < device.items["due"].deadline
    assert device.finished_at["short"] > device.finished_at["due"]


def test_only_requests_of_one_shape_step_together_and_no_more_than_a_batch_holds(clock):
    device = make(clock, seconds=lambda side, rows: 0.01, max_batch_size=4)
    device.add(*(request(f"a{i}", num_rows=2) for i in range(3)), request("b", side=256, steps=40))
    device.run()
    assert {frozenset(name[0] for name in group) for group in device.steps} == {frozenset("a"), frozenset("b")}
    assert max(len(group) for group in device.steps) == 2


def gain(side, rows):
    return 0.01 if side <= 512 else 0.04 * rows


def test_batches_are_used_where_they_raise_throughput_and_not_where_they_only_delay(clock):
    device = make(clock, seconds=gain)
    device.add(*(request(f"small-{i}", steps=200) for i in range(8)))
    device.run()
    sizes = [len(group) for group in device.steps]
    assert sum(size == 8 for size in sizes) > 0.9 * len(sizes)
    device.steps.clear()
    device.add(*(request(f"large-{i}", side=1024, steps=100) for i in range(8)))
    device.run()
    sizes = [len(group) for group in device.steps]
    assert sum(size == 1 for size in sizes) > 0.9 * len(sizes)


def test_a_small_shape_that_gains_nothing_is_found_out(clock):
    costs = StepCosts()
    for rows in (1, 2, 4, 8, 1, 2, 4, 8):
        costs.observe("small", 512 * 512, rows, 0.01 * rows)
    assert costs.best_rows("small", 512 * 512, 1, 8) == 1
    for rows in (1, 2, 4, 8):
        for _ in range(10):
            costs.observe("other", 512 * 512, rows, 0.01)
    assert costs.best_rows("other", 512 * 512, 1, 8) == 8
    assert costs.best_rows("other", 512 * 512, 4, 4) == 4


def test_steps_that_were_disturbed_do_not_decide_how_many_rows_step_together():
    costs = StepCosts()
    costs.observe("shape", 256 * 256, 16, 1.5)  # the first of its size
    for _ in range(7):
        costs.observe("shape", 256 * 256, 8, 0.9)
    assert costs.best_rows("shape", 256 * 256, 8, 16) == 16  # one says nothing
    costs.observe("shape", 256 * 256, 16, 1.6)
    costs.observe("shape", 256 * 256, 16, 2.0)
    assert costs.best_rows("shape", 256 * 256, 8, 16) == 16
    costs.observe("shape", 256 * 256, 8, 0.76)  # as good, but for 1 %
    assert costs.best_rows("shape", 256 * 256, 8, 16) == 8


def test_costs_of_what_was_never_run_follow_from_what_was():
    costs = StepCosts()
    costs.observe("seen", 512 * 512, 2, 0.02)
    assert costs.step_seconds("seen", 512 * 512, 1) == pytest.approx(0.01)
    assert costs.step_seconds("unseen", 1024 * 1024, 1) == pytest.approx(0.04)


def test_an_aborted_request_leaves_before_its_next_step(clock):
    device = make(clock)
    device.add(request("running", steps=20), request("waiting", side=1024))
    device.round()
    assert device.scheduler.abort("running")
    assert device.scheduler.abort("waiting")
    command, aborted = device.round()
    assert (command.release, command.step) == (("running",), ())
    assert {item.request_id for item in aborted} == {"running", "waiting"}
    assert not device.scheduler.has_requests
    assert not device.scheduler.abort("running")


def test_the_time_left_counts_those_that_are_served_before(clock):
    device = make(clock)
    device.add(request("short", side=768, steps=10), request("long", side=1024, steps=10))
    for _ in range(4):
        device.round()
    left = device.scheduler.seconds_left()
    short, long = left["short"], left["long"]
    assert short == pytest.approx(6 * proportional(768, 1), rel=0.01)
    assert long == pytest.approx(short + 10 * proportional(1024, 1), rel=0.01)
    assert list(left) == ["short", "long"]


def test_no_request_is_begun_that_would_not_fit(clock):
    # A request of 512 x 512 holds 100 MB, and a step needs 200 MB on top of all states.
    per_pixel = (200 * MB / 512**2, 100 * MB / 512**2)
    device = make(clock, budget=MemoryBudget(520 * MB), max_batch_size=1, bytes_per_pixel=per_pixel)
    device.add(request("first", steps=1))
    device.run()
    device.add(*(request(f"r{i}", steps=30, priority=-i) for i in range(6)))
    most = 0
    while device.scheduler.has_requests:
        device.round()
        most = max(most, device.scheduler.num_running)
        # A newcomer that goes first makes the scheduler want to begin one more.
        if len(device.items) < 20:
            device.add(request(f"more-{len(device.items)}", steps=30, priority=-100 - len(device.items)))
    assert most == 3
    assert len(device.finished_at) == len(device.items)


def test_a_batch_is_no_larger_than_memory_allows(clock):
    device = make(
        clock, seconds=lambda side, rows: 0.01, budget=MemoryBudget(1000 * MB), bytes_per_pixel=(200 * MB / 512**2, 0)
    )
    device.add(request("first", steps=1))
    device.run()
    device.add(*(request(f"r{i}", steps=5) for i in range(8)))
    device.run()
    assert max(len(group) for group in device.steps) == 4


@pytest.mark.parametrize(
    ("budget", "large", "huge"),
    [
        (1000 * MB, (2000 * MB, 1000 * MB), (2000 * MB, 1000 * MB)),  # it needs at least as much as the large one
        (3000 * MB, None, None),  # too far from what was measured to tell
    ],
)
def test_a_request_that_fits_not_even_alone_is_told_so(clock, budget, large, huge):
    device = make(clock, budget=MemoryBudget(budget), bytes_per_pixel=(500 * MB / 512**2, 0))
    device.add(request("small", steps=1))
    device.run()
    assert device.scheduler.shortage(request("small")) is None
    assert device.scheduler.shortage(request("large", side=1024)) == large
    assert device.scheduler.shortage(request("huge", side=2048)) == huge


def test_without_a_limit_the_budget_is_what_the_device_has_left():
    budget = MemoryBudget()
    assert budget.fits([], request("a"))
    assert not budget.fits([request("b")], request("a")), "nothing was measured, so it must run alone"
    assert MemoryBudget(is_cautious=False).fits([request("b")], request("a"))
    budget.observe("state", 512**2, 100 * MB)
    assert not budget.fits([request("b")], request("a")), "and the device was not asked"
    budget.observe_free(400 * MB, [request("a")])
    assert budget.fits([request("b")] * 3, request("a"))
    assert not budget.fits([request("b")] * 4, request("a"))


def test_a_running_video_whose_decoding_is_reckoned_from_pictures_keeps_no_picture_out():
    """In proportion to a picture's, its decoding would not fit; it runs all the same, and a picture fits beside it."""
    budget = MemoryBudget(10_000 * MB)
    budget.observe("state", 512**2, 10 * MB)
    budget.observe("step", 512**2, 500 * MB)
    budget.observe("decode", 512**2, 1000 * MB)
    video = request("video")
    video.volume = 100 * 512**2
    assert budget.fits([video], request("a"))
    assert not budget.fits([request("a")], video), "none like it is begun beside others"
    assert not budget.fits([video, *[request("b")] * 900], request("a")), "states take what there is"


def test_a_request_beyond_the_seats_waits_and_a_short_one_takes_the_next(clock):
    device = make(clock, max_num_seqs=1, max_batch_size=1)
    device.add(request("long", side=1024, steps=10))
    device.round()
    device.add(request("middle", side=768, steps=10), request("short", side=256, steps=2))
    device.run()
    assert sorted(device.finished_at, key=device.finished_at.get) == ["long", "short", "middle"]
