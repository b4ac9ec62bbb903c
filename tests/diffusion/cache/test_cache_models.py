"""Both step caches on every family: settings that never skip change nothing, others skip what they should."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from tests import tiny_flux, tiny_qwen_edit, tiny_wan
from tests.tiny_qwen_edit import picture
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.cache.apply import apply_cache, cached_transformers
from vllm_omni.diffusion.data import CacheConfig
from vllm_omni.diffusion.denoise import denoise_step
from vllm_omni.diffusion.models.qwen_image import pictures, pipeline_qwen_image_edit, pipeline_qwen_image_edit_plus

STEPS = 5
NEVER = {
    "tea_cache": {"rel_l1_thresh": 0},
    "cache_dit": {"residual_diff_threshold": 0, "max_warmup_steps": 0},
}
ALWAYS = {
    "tea_cache": {"rel_l1_thresh": 1, "coefficients": [1e-9, 0.0]},
    "cache_dit": {"residual_diff_threshold": 1e9, "max_warmup_steps": 0, "max_continuous_cached_steps": -1},
}
# Some steps are skipped, and which ones depends on the step that a request is at.
SOME = {
    "tea_cache": {"rel_l1_thresh": 1, "coefficients": [0.4, 0.0]},
    "cache_dit": {"residual_diff_threshold": 1e9, "max_warmup_steps": 2, "max_continuous_cached_steps": 1},
}
SIZE, VIDEO = {"height": 64, "width": 64}, {"height": 32, "width": 32, "num_frames": 5}
SHORT = SIZE | {"max_sequence_length": 16}
PLAIN = {"prompt": "a red circle"}
TEXT = PLAIN | {"negative_prompt": "blurry"}
PICTURE = {"multi_modal_data": {"image": picture(64, 64)}}

# family -> (builder, prompt, parameters, transformers that a request uses)
FAMILIES = {
    "qwen_image_edit": (tiny_qwen_edit.qwen_image_edit, TEXT | PICTURE, {}, 1),
    "qwen_image_edit_plus": (tiny_qwen_edit.qwen_image_edit_plus, TEXT | PICTURE, SIZE, 1),
    "qwen_image_layered": (tiny_qwen_edit.qwen_image_layered, TEXT | PICTURE, {"extra_args": {"layers": 1}}, 1),
    "flux": (tiny_flux.flux, TEXT, SHORT | {"true_cfg_scale": 3.0}, 1),
    "flux_kontext": (tiny_flux.flux_kontext, PLAIN | PICTURE, SHORT | {"extra_args": {"auto_resize": False}}, 1),
    "wan_two_experts": (tiny_wan.wan_t2v, TEXT, VIDEO, 2),
    "wan_ti2v": (tiny_wan.wan_ti2v, TEXT, VIDEO, 1),
    "wan_i2v": (tiny_wan.wan_i2v, TEXT | PICTURE, VIDEO, 2),
}


@dataclasses.dataclass
class Family:
    omni: Omni
    prompt: dict
    values: dict
    num_transformers: int

    @property
    def pipeline(self):
        return self.omni._engine._executor._worker._runner.pipeline

    @contextmanager
    def cached(self, backend, options):
        config = self.omni.od_config
        cache = CacheConfig(cache_backend=backend, cache_config=options)
        apply_cache(self.pipeline, dataclasses.replace(config, cache=cache))
        yield
        for component in cached_transformers(config):
            del self.pipeline.get_submodule(component).forward

    def state(self, seed=3, steps=STEPS, outputs=1):
        params = OmniDiffusionSamplingParams(
            seed=seed, num_inference_steps=steps, num_outputs_per_prompt=outputs, **self.values
        )
        with torch.inference_mode():
            return self.pipeline.prepare(self.omni._engine.validate(self.prompt, params))

    def step(self, *states):
        with torch.inference_mode():
            denoise_step([state for state in states if not state.is_done], self.pipeline)

    def finish(self, *states):
        while not all(state.is_done for state in states):
            self.step(*states)
        return [state.latents for state in states]


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    """Editing models bring pictures to a million pixels, which no tiny model needs."""
    fit_to_area = pictures.fit_to_area
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", 64 * 64)
        patch.setattr(pipeline_qwen_image_edit_plus, "_ENCODER_AREA", 64 * 64)
        patch.setattr(pipeline_qwen_image_edit_plus, "_LATENTS_AREA", 64 * 64)
        patch.setattr(
            pictures, "fit_to_area", lambda image, area, *multiple: fit_to_area(image, min(area, 80 * 80), *multiple)
        )
        yield


@pytest.fixture(scope="module", params=["qwen_image", *FAMILIES])
def family(request, tmp_path_factory):
    if request.param == "qwen_image":
        folder, prompt, values, count = request.getfixturevalue("qwen_folder"), TEXT, SIZE, 1
    else:
        build, prompt, values, count = FAMILIES[request.param]
        folder = build(tmp_path_factory.mktemp("cached") / request.param)
    with Omni(str(folder)) as omni:
        yield Family(omni, dict(prompt), values, count)


@pytest.mark.parametrize("backend", NEVER)
def test_settings_that_never_skip_give_the_uncached_result_bit_for_bit(family, backend):
    (uncached,) = family.finish(family.state())
    with family.cached(backend, NEVER[backend]):
        state = family.state()
        (latents,) = family.finish(state)
    assert torch.equal(latents, uncached)
    assert (state.cache.num_forwards, state.cache.num_skipped) == (STEPS * len(state.branches), 0)


@pytest.mark.parametrize("backend", ALWAYS)
def test_a_huge_threshold_skips_all_that_may_be_skipped(family, backend):
    with family.cached(backend, ALWAYS[backend]):
        state = family.state()
        (latents,) = family.finish(state)
    # Each transformer computes the first of its steps, and TeaCache the last of all.
    num_computed = family.num_transformers + (1 if backend == "tea_cache" else 0)
    assert state.cache.num_skipped == len(state.branches) * (STEPS - num_computed)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("backend", SOME)
def test_requests_at_different_steps_share_a_batch_and_get_what_they_get_alone(family, backend):
    with family.cached(backend, SOME[backend]):
        requests = [family.state(3, 5), family.state(4, 7, outputs=2)]
        alone = [family.state(3, 5), family.state(4, 7, outputs=2)]
        family.step(requests[0])
        together = family.finish(*requests)
        for state, latents, single in zip(requests, together, alone, strict=True):
            torch.testing.assert_close(latents, family.finish(single)[0], atol=1e-4, rtol=1e-4)
            assert state.cache.num_skipped == single.cache.num_skipped
    assert any(state.cache.num_skipped for state in requests)
