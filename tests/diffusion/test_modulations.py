"""Modulations of all steps, computed before they are needed: the same pictures, and each weight read but once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests import tiny_flux, tiny_qwen_edit
from tests.full_size import one_block
from tests.parity import relative_difference
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion import modulations
from vllm_omni.diffusion.denoise import denoise_step
from vllm_omni.diffusion.layers.linear import LinearBase, ModulationLinear
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image_edit_plus
from vllm_omni.diffusion.modulations import PreparedModulations, prepare_modulations
from vllm_omni.diffusion.staged_forward import BlockSpan, Conditioning, StagedForward
from vllm_omni.diffusion.step_memory import ForwardRow, StepMemory, forward_rows

NUM_BLOCKS = 2  # of each kind, in the tiny models
SAME = 1e-5  # of latents in float32, relative
TEACACHE = {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 1.0, "coefficients": [0.2, 0.0]}}
DBCACHE = {
    "cache_backend": "cache_dit",
    "cache_config": {"max_warmup_steps": 1, "residual_diff_threshold": 5.0, "max_continuous_cached_steps": 2},
}
PICTURE = {"image": tiny_qwen_edit.picture(64, 48)}


@pytest.fixture(scope="module")
def folders(qwen_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen_image": qwen_folder,
        "flux": tiny_flux.flux(root / "flux"),
        "two conditionings": tiny_qwen_edit.qwen_image_edit_plus(root / "edit", zero_cond_t=True),
    }


@pytest.fixture
def load(folders, monkeypatch):
    """``load(name, **options)`` -> the pipeline, and a function that prepares a request's state."""
    # The picture need not be seen in full to have modulations of its own.
    monkeypatch.setattr(pipeline_qwen_image_edit_plus, "_LATENTS_AREA", 128 * 128)
    opened = []

    def loaded(name, **options):
        omni = Omni(str(folders[name]), **options)
        opened.append(omni)
        pipeline = omni._engine._executor._worker._runner.pipeline
        pictures = PICTURE if name == "two conditionings" else None

        def state(seed=0, num_steps=7, num_outputs=1, true_cfg_scale=3.0):
            params = OmniDiffusionSamplingParams(
                height=32,
                width=48,
                seed=seed,
                num_inference_steps=num_steps,
                num_outputs_per_prompt=num_outputs,
                true_cfg_scale=true_cfg_scale,
            )
            prompt = {"prompt": f"a cat, {seed}", "negative_prompt": "blurry", "multi_modal_data": pictures}
            return pipeline.prepare(omni._engine.validate(prompt, params))

        return SimpleNamespace(pipeline=pipeline, state=state)

    yield loaded
    for omni in opened:
        omni.close()


@pytest.fixture
def products(monkeypatch):
    """The number of rows of each product of a modulation layer."""
    counted = []
    apply = LinearBase.forward

    def count(layer, x):
        if isinstance(layer, ModulationLinear):
            counted.append(len(x))
        return apply(layer, x)

    monkeypatch.setattr(LinearBase, "forward", count)
    return counted


def finished(model, *states, late=0):
    """The latents of requests that share their steps; the first is ``late`` steps ahead of the others."""
    with torch.inference_mode():
        for _ in range(late):
            denoise_step(states[:1], model.pipeline)
        while any(not state.is_done for state in states):
            denoise_step([state for state in states if not state.is_done], model.pipeline)
    return [state.latents for state in states]


def without(model):
    """The same model, each step of which computes its own modulations."""
    transformer = model.pipeline.transformer
    assert isinstance(transformer.stages, PreparedModulations), "a loaded model prepares them"
    transformer.stages = transformer.stages._stages
    return model


@pytest.mark.parametrize("steps_ahead", [3, 32])
@pytest.mark.parametrize("name", ["qwen_image", "flux", "two conditionings"])
def test_prepared_modulations_give_the_pictures_of_computed_ones(load, monkeypatch, name, steps_ahead):
    """Requests at different steps and of several outputs in one batch, with guidance."""
    monkeypatch.setattr(modulations, "STEPS_AHEAD", steps_ahead)
    asked = [{"seed": 1}, {"seed": 2, "num_steps": 4}, {"seed": 3, "num_outputs": 2}]
    model = load(name)
    ours = finished(model, *(model.state(**given) for given in asked), late=2)
    without(model)
    expected = finished(model, *(model.state(**given) for given in asked), late=2)
    for one, other in zip(ours, expected, strict=True):
        assert relative_difference(one, other) <= SAME


@pytest.mark.parametrize("name", ["qwen_image", "flux"])
@pytest.mark.parametrize("cache", [TEACACHE, DBCACHE])
def test_rows_that_skip_blocks_leave_the_others_their_own_modulations(load, name, cache):
    model = load(name, **cache)
    asked = [{"seed": 1}, {"seed": 2, "num_steps": 9}, {"seed": 3}]
    ours = [model.state(**given) for given in asked]
    finished(model, *ours, late=1)
    without(model)
    expected = [model.state(**given) for given in asked]
    finished(model, *expected, late=1)
    for one, other in zip(ours, expected, strict=True):
        assert 0 < one.cache.num_skipped == other.cache.num_skipped < one.cache.num_forwards
        assert relative_difference(one.latents, other.latents) <= SAME


@pytest.mark.parametrize(
    ("name", "num_layers", "num_rows"),
    [("qwen_image", 2 * NUM_BLOCKS, 1), ("flux", 3 * NUM_BLOCKS, 2)],
)
def test_weights_are_read_once_for_many_steps(load, monkeypatch, products, name, num_layers, num_rows):
    """Branches that differ in nothing but the text tokens share what is prepared; a pooled text is one's own."""
    monkeypatch.setattr(modulations, "STEPS_AHEAD", 4)
    model = load(name)
    finished(model, model.state(num_steps=7))
    assert products == [4 * num_rows] * num_layers + [3 * num_rows] * num_layers


def test_tokens_of_a_clean_picture_have_modulations_of_their_own(load, products):
    model = load("two conditionings")
    finished(model, model.state(num_steps=5))
    assert products == [5] * 2 * NUM_BLOCKS + [2] * NUM_BLOCKS * 5, "prepared ones, then those of timestep 0"


def test_a_step_that_failed_is_repeated_with_the_modulations_of_its_own_step(load, monkeypatch):
    monkeypatch.setattr(modulations, "STEPS_AHEAD", 2)
    model = load("flux")
    ours, failing = model.state(seed=1), [True, False] * 7
    predict = type(model.pipeline).predict

    def fail_first(*inputs):
        output = predict(model.pipeline, *inputs)
        if failing.pop(0):
            raise RuntimeError("no memory")
        return output

    monkeypatch.setattr(model.pipeline, "predict", fail_first)
    with torch.inference_mode():
        for _ in range(7):
            with pytest.raises(RuntimeError, match="no memory"):
                denoise_step([ours], model.pipeline)
            denoise_step([ours], model.pipeline)
    monkeypatch.undo()
    (expected,) = finished(without(model), model.state(seed=1))
    assert relative_difference(ours.latents, expected) <= SAME


def test_they_count_as_memory_of_the_request_and_go_with_its_last_step(load):
    model = load("qwen_image")
    state = model.state(num_steps=3)
    before = state.num_bytes
    layers = [layer for layer in model.pipeline.transformer.modules() if isinstance(layer, ModulationLinear)]
    with torch.inference_mode():
        denoise_step([state], model.pipeline)
        assert state.num_bytes == before + 3 * 4 * sum(layer.output_size for layer in layers)
        finished(model, state)
    assert not state.cache._modulations, "decoding needs the memory"
    assert state.num_bytes == before + 3 * 4 * sum(layer.output_size for layer in layers), "what it takes to run it"


def test_sharded_weights_and_conditions_of_a_step_are_left_to_each_step(load, products):
    model = without(load("qwen_image"))
    prepare_modulations(model.pipeline, SimpleNamespace(parallel_config=SimpleNamespace(use_hsdp=True)))
    assert not isinstance(model.pipeline.transformer.stages, PreparedModulations)
    prepare_modulations(model.pipeline, SimpleNamespace(parallel_config=SimpleNamespace(use_hsdp=False)))
    state = model.state(num_steps=2)
    state.step_conditions = ({}, {})
    finished(model, state)
    assert products == [2] * 2 * NUM_BLOCKS * 2, "both branches at each of two steps"
    assert not state.cache._modulations


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_full_size_block_takes_prepared_modulations(name, quantization):
    transformer, inputs, od_config = one_block(name, quantization)
    prepare_modulations(transformer, od_config)
    timesteps = torch.tensor([900.0, 500.0, 100.0, 90.0, 80.0, 70.0], device="cuda")
    memory = StepMemory()
    with torch.inference_mode():
        expected = transformer(**inputs)
        outputs = []
        for step in (0, 1):
            with forward_rows([ForwardRow(memory, 0, 0, step, 6, timesteps)]):
                outputs.append(transformer(**inputs))
    # The inputs are those of timestep 500. Their last layer is modulated by the forward's own timestep.
    assert relative_difference(outputs[1].float(), expected.float()) < 0.02
    assert relative_difference(outputs[0].float(), outputs[1].float()) > 0


class Stub(torch.nn.Module):
    """One block with modulation layers of these sizes, and one of a class that is not named."""

    _repeated_blocks = ("Block",)

    def __init__(self, *sizes):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block([ModulationLinear(8, size) for size in sizes]), torch.nn.Identity()])

    def stages(self):
        return StagedForward(
            streams=(torch.ones(1, 2, 8),),
            row_inputs=(torch.ones(1, 8),),
            conditioning=Conditioning(compute=lambda timestep: timestep[:, None].expand(-1, 8), others=()),
            spans=(BlockSpan(blocks=self.blocks, call=lambda block, streams, row_inputs, shared: streams),),
            modulated_input=lambda: torch.ones(1),
            output_tokens=lambda streams: streams[0],
            finish=lambda tokens, row_inputs: tokens,
        )


class Block(torch.nn.ModuleList):
    pass


@pytest.mark.parametrize(("sizes", "prepares"), [((8,), False), ((4, 4), False), ((8, 8), True)])
def test_modulations_as_wide_together_as_their_input_are_computed_in_each_step(sizes, prepares):
    model = Stub(*sizes)
    prepare_modulations(model, SimpleNamespace(parallel_config=SimpleNamespace(use_hsdp=False)))
    assert isinstance(model.stages, PreparedModulations) == prepares


def test_a_transformer_with_blocks_that_it_does_not_name_computes_its_modulations_in_each_step():
    model = Stub(8, 8)
    prepare_modulations(model, SimpleNamespace(parallel_config=SimpleNamespace(use_hsdp=False)))
    with forward_rows([ForwardRow(StepMemory(), 0, 0, 0, 2, torch.tensor([900.0, 100.0]))]):
        stages = model.stages()
    assert stages.block_parts is None
    assert torch.equal(stages.row_inputs[0], torch.ones(1, 8))
