"""Every layout gives the latents of one process, for every model, batched, with and without guidance."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch

from tests.parallel import generation
from tests.parallel.generation import distance_in_fp8, generate, largest_difference
from tests.parallel.layouts import DBCACHE, FOUR, TEACACHE, TWO
from tests.parallel.models import FAMILIES, MODELS, requests_of
from tests.parallel.toy_transformer import with_peers
from tests.parity import LATENT_TOLERANCE, assert_same_latents
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.distributed.groups import build_groups
from vllm_omni.diffusion.worker.worker import Worker

OTHERS = tuple(model for model in MODELS if model not in FAMILIES)


@functools.cache
def reference(folder, model, options=()):
    return generate(folder, dict(options), *requests_of(model))


def check(pool, folder, model, layout, features=None):
    features = features or {}
    expected = generate(folder, features, *requests_of(model)) if features else reference(folder, model)
    for outputs in pool.run(generate, folder, {**layout, **features}, *requests_of(model)):
        assert largest_difference(outputs, expected) <= LATENT_TOLERANCE
        assert [output.step_cache for output in outputs] == [output.step_cache for output in expected]
    return expected


@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("model", FAMILIES)
def test_two_ranks_give_the_latents_of_one(two_ranks, folders, model, layout):
    check(two_ranks, folders(model), model, TWO[layout])


def generate_over_files(files, *arguments):
    """:func:`generate` by ranks that use each other's memory, and what the receipts then say."""
    told, execute = set(), Worker.execute

    def listen(worker, command):
        result = execute(worker, command)
        told.update(result.accelerations)
        return result

    with (
        mock.patch.object(generation, "groups_of", lambda *args: with_peers(build_groups(*args), files)),
        mock.patch.object(Worker, "execute", listen),
    ):
        return generate(*arguments), told


@pytest.mark.parametrize("layout", ["tp2", "u2", "r2"])
def test_ranks_that_use_each_others_memory_give_the_latents_of_one(two_ranks, folders, tmp_path, layout):
    folder = folders("flux")
    for outputs, told in two_ranks.run(generate_over_files, str(tmp_path), folder, TWO[layout], *requests_of("flux")):
        assert largest_difference(outputs, reference(folder, "flux")) <= LATENT_TOLERANCE
        assert told == {"memory of peers"}


# Its reference picture has a thousand tokens, which takes long.
_OF_SHIPPED_EDIT = (*TWO, "u2-r2", "cfg2-tp2")


def cases(models, layouts):
    """All pairs; but six heads, as the shipped video model has, do not divide by four."""
    pairs = [(model, name) for model in models for name in layouts if (model, name) != ("shipped_video", "tp4")]
    return [(model, name) for model, name in pairs if model != "shipped_edit" or name in _OF_SHIPPED_EDIT]


@pytest.mark.parallel
@pytest.mark.parametrize(("model", "layout"), cases(OTHERS, TWO))
def test_two_ranks_give_the_latents_of_one_for_every_model(two_ranks, folders, model, layout):
    check(two_ranks, folders(model), model, TWO[layout])


@pytest.mark.parallel
@pytest.mark.parametrize(("model", "layout"), cases(MODELS, FOUR))
def test_four_ranks_give_the_latents_of_one(four_ranks, folders, model, layout):
    check(four_ranks, folders(model), model, FOUR[layout])


@pytest.mark.parametrize("layout", ["u2", "cfg2"])
def test_a_step_cache_skips_what_it_skips_on_one_rank(two_ranks, folders, layout):
    expected = check(two_ranks, folders("qwen_image"), "qwen_image", TWO[layout], TEACACHE)
    assert all(output.step_cache.num_skipped for output in expected)


@pytest.mark.parallel
@pytest.mark.parametrize("cache", [TEACACHE, DBCACHE], ids=["tea_cache", "cache_dit"])
@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("model", [*FAMILIES, "qwen_image_edit_plus", "wan_ti2v"])
def test_every_cache_skips_what_it_skips_on_one_rank(two_ranks, folders, model, layout, cache):
    expected = check(two_ranks, folders(model), model, TWO[layout], cache)
    assert all(output.step_cache.num_skipped for output in expected)


@pytest.mark.parametrize("layout", ["tp2", "u2", pytest.param("r2", marks=pytest.mark.parallel), "cfg2"])
@pytest.mark.parametrize("model", FAMILIES)
def test_ranks_in_fp8_are_as_near_to_full_precision_as_one_is(two_ranks, folders, model, layout):
    folder, fp8 = folders(model), {"quantization": "fp8"}
    exact = reference(folder, model)
    alone = distance_in_fp8(reference(folder, model, tuple(fp8.items())), exact)
    for outputs in two_ranks.run(generate, folder, {**fp8, **TWO[layout]}, *requests_of(model)):
        assert distance_in_fp8(outputs, exact) <= 1.25 * alone


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["tp2", "u2", "r2", "cfg2", "hsdp2"])
def test_compiled_blocks_work_on_two_ranks(two_ranks, folders, layout):
    check(two_ranks, folders("flux"), "flux", TWO[layout], {"enforce_eager": False})


@pytest.mark.parametrize("model", [*FAMILIES, *(pytest.param(m, marks=pytest.mark.parallel) for m in OTHERS)])
def test_two_ranks_decode_the_tiles_of_one(two_ranks, folders, model):
    prompts, params = requests_of(model)
    values = {**params[0], "output_type": "pt", "num_inference_steps": 1}
    if "height" in values:  # else the model works at a size of its own, which is larger
        values |= {"height": 320 if model == "shipped_edit" else 288, "width": 320}
    options = {"vae_use_tiling": True}
    expected = generate(folders(model), options, prompts[:1], [values])
    options |= {"cfg_parallel_size": 2, "vae_parallel_size": 2}
    for outputs in two_ranks.run(generate, folders(model), options, prompts[:1], [values]):
        assert largest_difference(outputs, expected) <= LATENT_TOLERANCE


@pytest.mark.parametrize("layout", ["tp2", "hsdp2"])
@pytest.mark.parametrize("model", FAMILIES)
def test_the_first_of_ranks_that_share_weights_decodes_by_itself(two_ranks, folders, model, layout):
    prompts, params = requests_of(model)
    arguments = prompts[:1], [{**params[0], "output_type": "pt", "num_inference_steps": 1}]
    expected = generate(folders(model), {}, *arguments)
    first, _ = two_ranks.run(generate, folders(model), TWO[layout], *arguments)
    assert largest_difference(first, expected) <= LATENT_TOLERANCE


@pytest.mark.parallel
@pytest.mark.parametrize("layout", [{"data_parallel_size": 2}, {"cfg_parallel_size": 2}], ids=["dp2", "cfg2"])
def test_the_noise_of_a_generator_is_the_same_on_ranks_and_goes_on(folders, layout):
    def latents(**options):
        noise = {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "num_inference_steps": 2}
        with Omni(folders("shipped_image"), device="cpu", **options) as omni:
            params = OmniDiffusionSamplingParams(height=64, width=64, **noise)
            outputs = [omni.generate(["a red circle"] * 2, params, max_batch_size=1) for _ in range(2)]
        return [torch.stack(list(output.images)) for pair in outputs for output in pair]

    expected = latents()
    for place, (got, wanted) in enumerate(zip(latents(**layout), expected, strict=True)):
        assert_same_latents(got, wanted)
        assert not any(torch.allclose(got, other, atol=0.1) for other in expected[:place])


@pytest.mark.parallel
@pytest.mark.parametrize("model", MODELS)
def test_two_replicas_give_the_latents_of_one(folders, model):
    prompts, params = requests_of(model)
    # A replica computes the request that it has alone.
    pairs = zip(prompts, params, strict=True)
    expected = [generate(folders(model), {}, [prompt], [values])[0] for prompt, values in pairs]
    with Omni(folders(model), device="cpu", data_parallel_size=2) as omni:
        outputs = omni.generate(prompts, [OmniDiffusionSamplingParams(**values) for values in params])
        places = {replica.num_in_flight for replica in omni._engine._executor.replicas}
    assert places == {0}
    for output, alone in zip(outputs, expected, strict=True):
        assert_same_latents(torch.stack(list(output.images)), alone.output)
