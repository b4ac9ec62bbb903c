"""The step caches on a toy model: what is computed, what is remembered, and for whom."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.diffusion.cache.toy import NUM_BLOCKS, ToyPipeline, finish, state
from vllm_omni.diffusion.cache.dbcache import DBCache
from vllm_omni.diffusion.cache.step_mask import step_mask
from vllm_omni.diffusion.cache.teacache import TeaCache
from vllm_omni.diffusion.cache_config import CacheDiTConfig, StepMaskPolicy
from vllm_omni.diffusion.denoise import denoise_step


def teacache(threshold, coefficients=(1.0, 0.0)):
    return TeaCache(threshold=threshold, coefficients=coefficients)


def dbcache(threshold, **values):
    values = {"max_warmup_steps": 0, "max_continuous_cached_steps": -1} | values
    return DBCache(CacheDiTConfig(residual_diff_threshold=threshold, **values))


# Caches that skip some of the steps and compute others.
CACHES = {
    "teacache": teacache(0.4),
    "dbcache": dbcache(0.3),
    "dbcache_both_ends": dbcache(0.3, Fn_compute_blocks=1, Bn_compute_blocks=1),
    "dbcache_text_at_the_end": dbcache(0.3, Fn_compute_blocks=1, Bn_compute_blocks=3),
    "taylorseer": dbcache(0.3, enable_taylorseer=True),
}


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


@pytest.mark.parametrize("never", [teacache(0.0), dbcache(0.0), dbcache(0.0, Fn_compute_blocks=2, Bn_compute_blocks=1)])
def test_a_threshold_of_zero_gives_the_uncached_result_bit_for_bit(never):
    pipeline = ToyPipeline(never)
    states = [state(1, guided=True), state(2, 5, num_outputs=2, text_length=4)]
    expected = finish(ToyPipeline(), state(1, guided=True), state(2, 5, num_outputs=2, text_length=4))
    for ours, uncached in zip(finish(pipeline, *states), expected, strict=True):
        assert torch.equal(ours, uncached)
    assert [(one.cache.num_forwards, one.cache.num_skipped) for one in states] == [(16, 0), (10, 0)]


def test_a_huge_threshold_computes_the_first_and_the_last_step_of_teacache():
    pipeline, one = ToyPipeline(teacache(1e9)), state(num_steps=8)
    finish(pipeline, one)
    assert pipeline.transformer.computed_rows(0) == [1, 1]
    assert (one.cache.num_forwards, one.cache.num_skipped) == (8, 6)


def test_a_huge_threshold_computes_the_outer_blocks_of_dbcache_at_every_step():
    pipeline, one = ToyPipeline(dbcache(1e9, Fn_compute_blocks=1, Bn_compute_blocks=1)), state(num_steps=8)
    finish(pipeline, one)
    counts = [len(pipeline.transformer.computed_rows(block)) for block in range(NUM_BLOCKS)]
    assert counts == [8, 1, 1, 8]
    assert one.cache.num_skipped == 7


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({"max_warmup_steps": 3}, [0, 1, 2]),
        ({"max_continuous_cached_steps": 2}, [0, 3, 6, 9]),
        ({"max_cached_steps": 4}, [0, 5, 6, 7, 8, 9]),
        ({"max_warmup_steps": 2, "max_continuous_cached_steps": 3}, [0, 1, 5, 9]),
        ({"scm_steps_mask_policy": "ultra"}, [step for step, on in enumerate(step_mask("ultra", 10)) if on]),
    ],
)
def test_limits_of_dbcache_compute_steps_whatever_has_changed(options, computed):
    pipeline, one = ToyPipeline(dbcache(1e9, **options)), state(num_steps=10)
    rows = pipeline.transformer.computed_rows()
    steps = []
    for step in range(10):
        before = len(rows)
        denoise_step([one], pipeline)
        steps += [step] * (len(rows) - before)
    assert steps == computed


def test_a_static_mask_skips_without_a_look_at_the_change():
    pipeline = ToyPipeline(dbcache(0.0, scm_steps_mask_policy="fast", scm_steps_policy="static"))
    one = state(num_steps=28)
    finish(pipeline, one)
    assert one.cache.num_skipped == 28 - sum(step_mask("fast", 28))


def test_a_step_mask_has_the_published_runs_and_is_stretched_to_other_requests():
    mask = "".join("01"[on] for on in step_mask("medium", 28))
    assert mask == "1111110" + "11000" * 4 + "1"
    assert "".join("01"[on] for on in step_mask("balanced", 28)) == "11111001" + "0001" * 4 + "0111"
    for policy in get_args(StepMaskPolicy):
        for num_steps in (1, 2, 7, 50):
            mask = step_mask(policy, num_steps)
            assert len(mask) == num_steps
            assert mask[0]
            assert mask[-1]
        assert abs(sum(step_mask(policy, 280)) - 10 * sum(step_mask(policy, 28))) <= 1


def reference_teacache(pipeline, one, threshold, coefficients):
    """The published algorithm on one request of one branch, in its own words. Returns the steps that computed."""
    accumulated, previous_input, previous_residual, computed = 0.0, None, None, []
    transformer, latents = pipeline.transformer, one.latents
    for step in range(one.num_steps):
        stages = transformer.stages(latents, one.timesteps[step : step + 1], one.branches[0]["text"], None)
        modulated = stages.modulated_input()
        if step in (0, one.num_steps - 1):
            should_calc, accumulated = True, 0.0
        else:
            change = ((modulated - previous_input).abs().mean() / previous_input.abs().mean()).item()
            accumulated += sum(c * change**power for power, c in enumerate(reversed(coefficients)))
            should_calc = accumulated >= threshold
            if should_calc:
                accumulated = 0.0
        previous_input = modulated
        if should_calc:
            computed.append(step)
            tokens = stages.output_tokens(stages.run_blocks(stages.streams, stages.row_inputs, 0, NUM_BLOCKS))
            previous_residual = tokens - latents
        else:
            tokens = latents + previous_residual
        velocity = stages.finish(tokens, stages.row_inputs)
        latents = latents + (one.sigmas[step + 1] - one.sigmas[step]) * velocity
    return computed, latents


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 1.2])
@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.5, 2.0, 0.05), (3.0, -0.2, 0.4, 0.01)])
def test_teacache_accumulates_and_rescales_as_published(threshold, coefficients):
    expected_steps, expected = reference_teacache(ToyPipeline(), state(num_steps=20), threshold, coefficients)
    pipeline, one = ToyPipeline(teacache(threshold, coefficients)), state(num_steps=20)
    (latents,) = finish(pipeline, one)
    assert one.cache.num_skipped == 20 - len(expected_steps)
    torch.testing.assert_close(latents, expected)


def test_a_polynomial_below_zero_counts_by_its_size():
    cache = teacache(0.2, (-400.0, 0.0))
    assert cache.distance(0.5) == 200.0


def test_requests_at_different_steps_share_a_batch_and_get_what_they_get_alone(cache):
    def requests():
        return [state(1, 12), state(2, 7, num_outputs=2, text_length=6), state(3, 9, text_length=2, guided=True)]

    alone = [finish(ToyPipeline(cache), one)[0] for one in requests()]
    skipped = []
    for one in requests():
        finish(ToyPipeline(cache), one)
        skipped.append(one.cache.num_skipped)
    pipeline, (first, second, third) = ToyPipeline(cache), requests()
    for group in ([first], [first, second], [first, second], [first, second, third]):
        denoise_step(group, pipeline)
    together = finish(pipeline, first, second, third)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert [one.cache.num_skipped for one in (first, second, third)] == skipped
    assert 0 < sum(skipped) < 12 + 2 * 7 + 2 * 9
    # At some step, some rows went through the blocks while others did not.
    assert len(set(pipeline.transformer.computed_rows(1))) > 1


def test_only_rows_that_compute_go_through_the_blocks():
    pipeline = ToyPipeline(dbcache(1e9, max_warmup_steps=2))
    old, new = state(1, 6), state(2, 6)
    for _ in range(3):
        denoise_step([old], pipeline)
    denoise_step([old, new], pipeline)
    assert pipeline.transformer.computed_rows(0)[-1] == 2
    assert pipeline.transformer.computed_rows(1)[-1] == 1


def test_outputs_and_branches_decide_for_themselves(cache):
    pipeline, several = ToyPipeline(cache), state(4, 12, num_outputs=3, guided=True)
    (latents,) = finish(pipeline, several)
    for output in range(3):
        single = state(4, 12, num_outputs=3, guided=True)
        single.latents = single.latents[output : output + 1]
        single.history = single.sampler.initial_history(single.latents)
        torch.testing.assert_close(finish(ToyPipeline(cache), single)[0], latents[output : output + 1])


def test_a_request_that_is_split_over_forwards_keeps_its_rows_apart(cache):
    one, other = state(4, 12, num_outputs=3), state(4, 12, num_outputs=3)
    whole, split = ToyPipeline(cache), ToyPipeline(cache)
    while not one.is_done:
        denoise_step([one], whole, 16)
        denoise_step([other], split, 2)
    torch.testing.assert_close(one.latents, other.latents)
    assert one.cache.num_skipped == other.cache.num_skipped


def test_a_step_that_failed_and_is_repeated_leaves_no_trace_in_the_cache(cache):
    undisturbed, retried = state(5, 10, guided=True), state(5, 10, guided=True)
    pipeline = ToyPipeline(cache)
    finish(ToyPipeline(cache), undisturbed)
    while not retried.is_done:
        pipeline.fails = True
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no memory"):
                denoise_step([retried], pipeline)
        pipeline.fails = False
        denoise_step([retried], pipeline)
    assert torch.equal(retried.latents, undisturbed.latents)
    assert retried.cache.num_forwards == undisturbed.cache.num_forwards
    assert retried.cache.num_skipped == undisturbed.cache.num_skipped


def test_taylorseer_goes_on_along_the_last_change():
    repeated, forecast, exact = state(6, 16), state(6, 16), state(6, 16)
    options = {"max_warmup_steps": 4, "max_continuous_cached_steps": 2}
    finish(ToyPipeline(dbcache(1e9, **options)), repeated)
    finish(ToyPipeline(dbcache(1e9, enable_taylorseer=True, **options)), forecast)
    finish(ToyPipeline(), exact)
    assert forecast.cache.num_skipped == repeated.cache.num_skipped > 0
    assert (forecast.latents - exact.latents).norm() < (repeated.latents - exact.latents).norm()


def test_nothing_is_remembered_after_the_last_step(cache):
    one = state(7, 5)
    finish(ToyPipeline(cache), one)
    assert set(one.cache._entries.values()) == {None}


def test_the_transformer_outside_of_a_step_is_the_uncached_one(cache):
    arguments = torch.randn(1, 5, 8), torch.tensor([500.0]), torch.randn(1, 3, 8), None
    expected = ToyPipeline().transformer(*arguments)
    assert torch.equal(ToyPipeline(cache).transformer(*arguments), expected)
