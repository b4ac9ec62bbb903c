"""Within a step the host waits for the device nowhere but where a step cache decides."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import DeviceType

from tests import tiny, tiny_flux, tiny_wan
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.cache import reuse
from vllm_omni.diffusion.worker import model_runner

pytestmark = pytest.mark.gpu

# family: (checkpoint, parameters of guidance)
FAMILIES = {
    "flux": (tiny_flux.flux, {"true_cfg_scale": 3.0}),
    "qwen_image": (tiny.qwen_image, {"true_cfg_scale": 3.0}),
    "wan": (tiny_wan.wan_t2v, {"guidance_scale": 4.0, "num_frames": 5}),
}
CACHES = {
    "none": {},
    "tea_cache": {"cache_backend": "tea_cache"},
    "cache_dit": {"cache_backend": "cache_dit", "cache_config": {"enable_taylorseer": True}},
    "static mask": {
        "cache_backend": "cache_dit",
        "cache_config": {"scm_steps_mask_policy": "medium", "scm_steps_policy": "static"},
    },
}
DECIDES_ON_THE_HOST = ("tea_cache", "cache_dit")
NUM_STEPS = (12, 10)
JOINED_AFTER = 3  # steps


class Waits:
    """Runs steps with waits forbidden, and counts those that a step cache is allowed."""

    def __init__(self, monkeypatch):
        self.num_allowed = 0
        self.num_steps = 0
        self._step, self._waiting_for = model_runner.denoise_step, reuse.waiting_for
        monkeypatch.setattr(model_runner, "denoise_step", self.step)
        monkeypatch.setattr(reuse, "waiting_for", self.allowed)

    def step(self, *args):
        self.num_steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def allowed(self, what):
        self.num_allowed += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            with self._waiting_for(what):
                yield
        finally:
            torch.cuda.set_sync_debug_mode("error")


def serve(omni, guidance):
    """Two guided requests, the second of which comes while the first takes its steps. Steps told, by request."""
    engine = omni._engine
    progress, outputs = {}, []

    def add(seed):
        values = {"height": 64, "width": 64, "num_inference_steps": NUM_STEPS[seed], "seed": seed, **guidance}
        prompt = {"prompt": ["a red circle", "a cat holding a sign"][seed], "negative_prompt": "blurry"}
        engine.add_request(engine.validate(prompt, OmniDiffusionSamplingParams(**values)))

    def one_round():
        done = engine.step()
        outputs.extend(done.outputs)
        for event in done.progress:
            progress.setdefault(event.request_id, []).append(event.step)

    add(0)
    for _ in range(JOINED_AFTER):
        one_round()
    add(1)
    while engine.has_requests:
        one_round()
    assert [output.error for output in outputs] == [None, None]
    assert list(progress.values()) == [list(range(1, number + 1)) for number in NUM_STEPS]
    return outputs


def check(folder, guidance, cache, monkeypatch, *, enforce_eager):
    with Omni(str(folder), enforce_eager=enforce_eager, **CACHES[cache]) as omni:
        for _ in range(1 if enforce_eager else 3):  # a shape is compiled, and captured when it comes for the third time
            serve(omni, guidance)
        waits = Waits(monkeypatch)
        outputs = serve(omni, guidance)
    assert waits.num_steps >= max(NUM_STEPS[0], JOINED_AFTER + NUM_STEPS[1])
    if cache in DECIDES_ON_THE_HOST:
        assert 0 < waits.num_allowed <= 2 * waits.num_steps, "once per forward, and both branches may need their own"
    else:
        assert waits.num_allowed == 0
    return outputs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_guided_step_of_two_requests_waits_only_where_a_cache_decides(family, cache, tmp_path, monkeypatch):
    build, guidance = FAMILIES[family]
    check(build(tmp_path / "model"), guidance, cache, monkeypatch, enforce_eager=True)


@pytest.mark.parametrize("cache", CACHES)
def test_nor_does_a_compiled_one_that_replays_graphs(cache, tmp_path, monkeypatch):
    folder = tiny_flux.flux(tmp_path / "model")
    outputs = check(folder, FAMILIES["flux"][1], cache, monkeypatch, enforce_eager=False)
    assert {"torch.compile", "CUDA graphs"} <= set(outputs[0].receipt.accelerations)


def test_the_profiler_sees_a_round_wait_for_nothing_but_the_step_before(tmp_path):
    """The engine's round as it is served, with its events of progress: the host runs one step ahead, by an event."""
    with Omni(str(tiny_flux.flux(tmp_path / "model"))) as omni:
        serve(omni, FAMILIES["flux"][1])
        engine = omni._engine
        params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=8, seed=0, true_cfg_scale=3.0)
        for prompt in ("a red circle", "a cat"):
            engine.add_request(engine.validate({"prompt": prompt, "negative_prompt": "blurry"}, params))
        for _ in range(3):
            engine.step()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(3):
                with torch.profiler.record_function("round"):
                    engine.step()
        engine.discard_all()
    events = profiler.events()
    rounds = [event.time_range for event in events if event.name == "round" and event.device_type == DeviceType.CPU]
    within = [
        event.name
        for event in events
        if any(each.start <= event.time_range.start <= each.end for each in rounds) and event.name != "round"
    ]
    assert len(rounds) == 3
    assert any("LaunchKernel" in name for name in within), "the profiler sees what the host starts"
    waits = {name for name in within if "Synchronize" in name or name in ("cudaMemcpy", "aten::item")}
    assert waits <= {"cudaEventSynchronize"}
