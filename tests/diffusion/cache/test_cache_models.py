"""Both step caches on every family: settings that never skip change nothing, others skip what they should."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import tiny_flux, tiny_qwen_edit, tiny_wan
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.models.qwen_image import pictures, pipeline_qwen_image_edit, pipeline_qwen_image_edit_plus

STEPS = 6
NEVER = {
    "tea_cache": {"rel_l1_thresh": 0},
    "cache_dit": {"residual_diff_threshold": 0, "max_warmup_steps": 0},
}
ALWAYS = {
    "tea_cache": {"rel_l1_thresh": 1e9},
    "cache_dit": {"residual_diff_threshold": 1e9, "max_warmup_steps": 0, "max_continuous_cached_steps": -1},
}
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
SIZE = {"height": 64, "width": 64}
VIDEO = {"height": 32, "width": 32, "num_frames": 5}
EDIT = {"prompt": "a red circle", "negative_prompt": "blurry", "multi_modal_data": {"image": PICTURE}}
TEXT = {"prompt": "a red circle", "negative_prompt": "blurry"}

# family -> (builder, prompt, parameters, transformers that a request uses)
FAMILIES = {
    "qwen_image_edit": (tiny_qwen_edit.qwen_image_edit, EDIT, {}, 1),
    "qwen_image_edit_plus": (tiny_qwen_edit.qwen_image_edit_plus, EDIT, SIZE, 1),
    "qwen_image_layered": (tiny_qwen_edit.qwen_image_layered, EDIT, {"extra_args": {"layers": 1}}, 1),
    "flux": (tiny_flux.flux, TEXT, {**SIZE, "true_cfg_scale": 3.0}, 1),
    "flux_kontext": (
        tiny_flux.flux_kontext,
        {"prompt": "a red circle", "multi_modal_data": {"image": PICTURE}},
        {**SIZE, "extra_args": {"auto_resize": False}},
        1,
    ),
    "wan_two_experts": (tiny_wan.wan_t2v, TEXT, VIDEO, 2),
    "wan_ti2v": (tiny_wan.wan_ti2v, TEXT, VIDEO, 1),
    "wan_i2v": (tiny_wan.wan_i2v, EDIT, VIDEO, 2),
}


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    """Editing models bring pictures to a million pixels, which no tiny model needs."""
    fit_to_area = pictures.fit_to_area
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", 64 * 64)
        patch.setattr(pipeline_qwen_image_edit_plus, "_ENCODER_AREA", 56 * 56)
        patch.setattr(pipeline_qwen_image_edit_plus, "_LATENTS_AREA", 64 * 64)
        patch.setattr(pictures, "fit_to_area", lambda image, area: fit_to_area(image, area // 100))
        yield


@pytest.fixture(scope="module", params=["qwen_image", *FAMILIES])
def family(request, tmp_path_factory, qwen_folder):
    """A folder, a request that its model takes, and the uncached result."""
    if request.param == "qwen_image":
        folder, prompt, values, num_transformers = qwen_folder, TEXT, SIZE, 1
    else:
        build, prompt, values, num_transformers = FAMILIES[request.param]
        folder = build(tmp_path_factory.mktemp("cached") / request.param)
    params = OmniDiffusionSamplingParams(seed=3, num_inference_steps=STEPS, output_type="latent", **values)
    with Omni(str(folder)) as omni:
        uncached = omni.generate(prompt, params)[0]
    assert uncached.receipt.step_cache is None
    return folder, prompt, params, num_transformers, torch.stack(uncached.images)


@pytest.mark.parametrize("backend", NEVER)
def test_settings_that_never_skip_give_the_uncached_result_bit_for_bit(family, backend):
    folder, prompt, params, _, uncached = family
    with Omni(str(folder), cache_backend=backend, cache_config=NEVER[backend]) as omni:
        output = omni.generate(prompt, params)[0]
    assert torch.equal(torch.stack(output.images), uncached)
    assert output.receipt.step_cache.num_skipped == 0
    assert output.receipt.step_cache.num_forwards % STEPS == 0
    assert output.receipt.accelerations[-1].startswith(f"{backend}: skipped 0 of")


@pytest.mark.parametrize("backend", ALWAYS)
def test_a_huge_threshold_skips_all_that_may_be_skipped(family, backend):
    folder, prompt, params, num_transformers, uncached = family
    with Omni(str(folder), cache_backend=backend, cache_config=ALWAYS[backend]) as omni:
        output = omni.generate(prompt, params)[0]
    use = output.receipt.step_cache
    num_rows = use.num_forwards // STEPS
    # Each transformer computes the first of its steps, and TeaCache the last of all.
    num_computed = num_transformers + (1 if backend == "tea_cache" else 0)
    assert use.num_skipped == num_rows * (STEPS - num_computed)
    latents = torch.stack(output.images)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, uncached)


@pytest.mark.parametrize("config", [{"rel_l1_thresh": 0.3, "coefficients": [1.0, 0.0]}, {}])
def test_a_mixed_batch_with_a_cache_gives_what_each_request_gives_alone(family, config):
    folder, prompt, params, _, _ = family
    backend = "tea_cache" if config else "cache_dit"
    config = config or {"residual_diff_threshold": 0.2, "max_warmup_steps": 1, "Bn_compute_blocks": 0}
    values = {name: getattr(params, name) for name in ("height", "width", "num_frames", "true_cfg_scale")}
    values |= {"extra_args": params.extra_args, "output_type": "latent"}
    mixed = [
        OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, num_outputs_per_prompt=count, **values)
        for seed, steps, count in ((3, 6, 1), (4, 9, 2), (5, 4, 1))
    ]
    longer = {**prompt, "prompt": "a cat holding a sign that says hello"}
    prompts = [prompt, longer, prompt]
    with Omni(str(folder), cache_backend=backend, cache_config=config) as omni:
        together = omni.generate(prompts, mixed)
        alone = [omni.generate(one, values)[0] for one, values in zip(prompts, mixed, strict=True)]
    for batched, single in zip(together, alone, strict=True):
        assert batched.receipt.step_cache == single.receipt.step_cache
        torch.testing.assert_close(torch.stack(batched.images), torch.stack(single.images), atol=1e-4, rtol=1e-4)
    assert any(output.receipt.step_cache.num_skipped for output in alone)
