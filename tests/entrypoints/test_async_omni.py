from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from tests.entrypoints.test_omni import max_difference
from vllm_omni import AsyncOmni, Omni, OmniDiffusionSamplingParams
from vllm_omni.entrypoints.live_requests import MAX_UNREAD_EVENTS, LiveRequest, LiveRequests, Watcher
from vllm_omni.errors import EngineClosedError, EngineFailureError, GenerationError, InvalidRequestError, QueueFullError
from vllm_omni.outputs import OmniRequestOutput, StepProgress

SMALL = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 1}


def params(**values):
    return OmniDiffusionSamplingParams(**(SMALL | values))


@pytest.fixture(scope="module")
def omni(qwen_folder):
    with AsyncOmni(str(qwen_folder)) as running:
        yield running


@pytest.fixture
def runner(omni):
    return omni.engine._executor._worker._runner


async def collect(events):
    return [event async for event in events]


async def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


def test_a_model_without_a_map_is_previewed_by_its_decoder(qwen_folder, monkeypatch):
    async def run(omni):
        params = OmniDiffusionSamplingParams(height=64, width=48, num_inference_steps=3, seed=1)
        return [event async for event in omni.generate("a red circle", params, previews={1, 3})]

    with AsyncOmni(str(qwen_folder)) as omni:
        assert not omni.engine.has_quick_previews
        # Also after the last step, which is shown to nobody otherwise.
        needs = omni.live.needs_preview
        monkeypatch.setattr(omni.engine, "_needs_preview", lambda key, step, num_steps: needs(key, step, num_steps + 1))
        first, second, third, output = asyncio.run(run(omni))
    assert first.preview.shape == (1, 64, 48, 3)
    assert second.preview is None
    # After the last step a request has arrived at what it was heading for.
    assert np.abs(third.preview[0].astype(int) - np.asarray(output.images[0]).astype(int)).max() <= 1


def test_a_preview_that_fails_ends_no_request(omni, runner, monkeypatch):
    def decode(state):
        raise torch.OutOfMemoryError("on purpose")

    async def run():
        return [event async for event in omni.generate("a cat", params(output_type="latent"), previews={1, 2})]

    monkeypatch.setattr(runner.pipeline, "decode", decode)
    *steps, output = asyncio.run(run())
    assert [event.preview for event in steps] == [None] * 3
    assert output.finished


def test_events_are_the_steps_and_then_the_result(omni, qwen_omni):
    *steps, output = asyncio.run(collect(omni.generate("a cat", params(), request_id="mine")))
    assert [(event.request_id, event.step, event.num_steps) for event in steps] == [("mine", i, 3) for i in (1, 2, 3)]
    assert (output.request_id, output.finish_reason) == ("mine", "completed")
    assert max_difference(output, qwen_omni.generate("a cat", params())[0]) == 0


def test_requests_of_several_event_loops_run_at_once(omni):
    outputs = []

    def one(prompt):
        outputs.append(asyncio.run(omni.complete(prompt, params())))

    threads = [threading.Thread(target=one, args=(f"cat {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(output.prompt for output in outputs) == [f"cat {i}" for i in range(4)]


def test_leaving_the_iteration_ends_the_request_within_a_step(omni, runner):
    async def leave():
        events = omni.generate("a cat", params(num_inference_steps=2000), request_id="left")
        async for event in events:
            if event.step == 2:
                break
        await events.aclose()
        await until(lambda: omni.live.find("left").is_finished)
        return omni.live.find("left")

    left = asyncio.run(leave())
    assert left.state == "aborted"
    assert left.step < 100
    assert not runner._running


def test_a_cancelled_task_ends_its_request_and_no_other(omni):
    async def cancel():
        cancelled = asyncio.create_task(omni.complete("a cat", params(num_inference_steps=2000), request_id="gone"))
        kept = asyncio.create_task(omni.complete("a dog", params(num_inference_steps=50)))
        await until(lambda: (live := omni.live.find("gone")) is not None and live.step > 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await until(lambda: omni.live.find("gone").is_finished)
        return await kept

    assert asyncio.run(cancel()).finished
    assert omni.live.find("gone").state == "aborted"


def test_an_aborted_request_ends_with_an_unfinished_result(omni):
    async def abort():
        events = []
        async for event in omni.generate("a cat", params(num_inference_steps=2000), request_id="stopped"):
            events.append(event)
            omni.abort("stopped")
        return events

    output = asyncio.run(abort())[-1]
    assert (output.finished, output.finish_reason, output.images) == (False, "aborted", [])
    assert not omni.abort("stopped")
    assert not omni.abort("never-was")


def test_an_error_of_one_request_harms_no_other(omni, runner, monkeypatch):
    predict = runner.pipeline.predict

    def fails_for_one(latents, timestep, conditions):
        if latents.shape[1] == 16:  # 64 x 64 pixels
            raise RuntimeError("the kernel gave up")
        return predict(latents, timestep, conditions)

    monkeypatch.setattr(runner.pipeline, "predict", fails_for_one)

    async def both():
        return await asyncio.gather(
            omni.complete("a cat", params(height=64, width=64)),
            omni.complete("a dog", params()),
            return_exceptions=True,
        )

    failed, kept = asyncio.run(both())
    assert isinstance(failed, GenerationError)
    assert "the kernel gave up" in str(failed)
    assert kept.finished
    told = next(live for live in omni.live.all() if live.error is not None)
    assert str(told.error) == "the kernel gave up"
    assert told.error.__traceback__ is None, "its frames would keep tensors alive"


def test_a_failure_of_the_workers_takes_those_in_progress_and_the_engine_goes_on(qwen_folder, monkeypatch):
    async def run(omni):
        worker = omni.engine._executor._worker
        execute, calls = worker.execute, []

        def dies_once(command):
            calls.append(command)
            if len(calls) == 3:
                raise ConnectionError("the worker is gone")
            return execute(command)

        monkeypatch.setattr(worker, "execute", dies_once)
        tasks = [omni.complete(prompt, params(num_inference_steps=5)) for prompt in ("one", "two")]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        again = await omni.complete("three", params())
        return results, again, worker._runner._running

    with AsyncOmni(str(qwen_folder), max_num_seqs=1) as omni:
        results, again, left = asyncio.run(run(omni))
    failed = [result for result in results if isinstance(result, GenerationError)]
    assert len(failed) == 1
    assert isinstance(failed[0].__cause__, EngineFailureError)
    assert [result.finished for result in results if isinstance(result, OmniRequestOutput)] == [True]
    assert again.finished
    assert not left, "the lost request's state was released"


def test_a_failure_inside_the_engine_gives_errors_to_all_and_the_engine_goes_on(qwen_folder, monkeypatch):
    told = []

    async def run(omni):
        omni.listeners.append(lambda completed: told.extend(completed.outputs))
        step = omni.engine.step
        monkeypatch.setattr(omni.engine, "step", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
        results = await asyncio.gather(
            *(omni.complete(prompt, params()) for prompt in ("one", "two")), return_exceptions=True
        )
        monkeypatch.setattr(omni.engine, "step", step)
        return results, await omni.complete("three", params())

    with AsyncOmni(str(qwen_folder)) as omni:
        results, again = asyncio.run(run(omni))
    assert all(isinstance(result.__cause__, EngineFailureError) for result in results)
    assert again.finished
    assert [output.finish_reason for output in told] == ["failed", "failed", "completed"], "metrics count them"


def test_a_full_queue_refuses_and_says_when_to_come_again(qwen_folder):
    async def fill(omni):
        tasks = [asyncio.create_task(omni.complete("a cat", params(num_inference_steps=500)))]
        await until(lambda: omni.engine.num_running == 1)
        tasks += [asyncio.create_task(omni.complete("a cat", params())) for _ in range(2)]
        await until(lambda: omni.engine.num_waiting == 2)
        with pytest.raises(QueueFullError) as caught:
            await omni.complete("a cat", params())
        seconds_of_all = omni.engine.seconds_of_work
        for task in tasks:
            task.cancel()
        return caught.value.retry_after_s, seconds_of_all

    with AsyncOmni(str(qwen_folder), max_num_seqs=1, max_queue=2) as omni:
        retry_after_s, seconds_of_all = asyncio.run(fill(omni))
        assert 0 < retry_after_s < seconds_of_all


def test_closing_ends_what_is_in_progress(qwen_folder):
    async def close(omni):
        task = asyncio.create_task(omni.complete("a cat", params(num_inference_steps=2000)))
        await until(lambda: omni.engine.num_running == 1)
        await asyncio.to_thread(omni.close)
        output = await task
        with pytest.raises(EngineClosedError):
            await omni.complete("a cat", params())
        return output

    with AsyncOmni(str(qwen_folder)) as omni:
        assert asyncio.run(close(omni)).finish_reason == "aborted"


def test_bad_requests_are_refused_before_they_are_queued(omni):
    with pytest.raises(InvalidRequestError, match="height"):
        asyncio.run(omni.complete("a cat", params(height=33)))

    async def twice():
        await asyncio.gather(*(omni.complete("a cat", params(), request_id="same") for _ in range(2)))

    with pytest.raises(InvalidRequestError, match="in use"):
        asyncio.run(twice())
    end = time.monotonic() + 10
    while omni.engine.has_requests:  # the first of the two, whose caller has gone
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pictures_of_few_requests_are_decoded_at_a_time(omni, monkeypatch):
    under_way, most = [], []

    def decode(*_):
        under_way.append(None)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.pop()
        raise InvalidRequestError("it is no picture", param="image")

    monkeypatch.setattr(omni.engine, "validate", decode)

    async def send():
        prompt = {"prompt": "a cat", "multi_modal_data": {"image": b"x"}}
        return await asyncio.gather(*(omni.complete(prompt) for _ in range(6)), return_exceptions=True)

    assert {type(answer) for answer in asyncio.run(send())} == {InvalidRequestError}
    assert max(most) == 2


def test_a_watcher_that_does_not_read_keeps_little_and_hears_of_the_end():
    async def fill():
        watcher = Watcher()
        for step in range(1000):
            watcher.put(StepProgress(request_id="a", step=step, num_steps=1000))
        watcher.put(OmniRequestOutput(request_id="a", prompt=None))
        return [event async for event in watcher.events()]

    events = asyncio.run(fill())
    assert len(events) == MAX_UNREAD_EVENTS
    assert isinstance(events[-1], OmniRequestOutput)


def test_a_watcher_gets_the_previews_for_which_it_asked_and_no_others():
    async def watch():
        live, watched = LiveRequests(), ({1, 2}, {2, 3}, frozenset())
        watchers = [Watcher(previews=steps) for steps in watched]
        request = LiveRequest(request_id="a", kind="image", prompt="", width=8, height=8, num_frames=None, num_steps=4)
        live.add(request, watchers[0])
        for watcher in watchers[1:]:
            live.watch("a", watcher)
        for step in range(1, 5):
            preview = "shown" if live.needs_preview("a", step, 4) else None
            live.tell([StepProgress(request_id="a", step=step, num_steps=4, preview=preview)])
        live.tell([OmniRequestOutput(request_id="a", prompt=None)])
        return [await collect(watcher.events()) for watcher in watchers]

    told = asyncio.run(watch())
    shown = [[event.step for event in events[:-1] if event.preview is not None] for events in told]
    assert shown == [[1, 2], [2, 3], []]
    assert [[event.step for event in events[:-1]] for events in told] == [[1, 2, 3, 4]] * 3


def test_offline_and_online_give_the_same_picture(qwen_folder, omni):
    with Omni(str(qwen_folder)) as offline:
        expected = offline.generate("a cat", params())[0]
    assert max_difference(asyncio.run(omni.complete("a cat", params())), expected) == 0
