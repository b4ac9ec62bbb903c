"""The logic around CUDA graphs on a CPU, where a graph is a function that runs again; real ones on a GPU."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.full_size_models import MODELS
from tests import tiny_flux, tiny_wan
from tests.diffusion.cache.toy import NUM_BLOCKS, TOKENS, WIDTH, Toy
from tests.full_size import one_block
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion import cuda_graph
from vllm_omni.diffusion.cuda_graph import GraphedBlocks, apply_cuda_graphs
from vllm_omni.diffusion.distributed.sequence_parallel import sharded_forward
from vllm_omni.diffusion.layers import kernels, linear_method
from vllm_omni.diffusion.modulations import prepare_modulations
from vllm_omni.diffusion.step_memory import ForwardRow, StepMemory, forward_rows


def repeat_instead_of_replaying(shapes, run):
    """What a capture leaves: outputs that stay where they are, and a replay that writes them anew."""
    shapes.outputs = run()

    def replay():
        for kept, new in zip(shapes.outputs, run(), strict=True):
            kept.copy_(new)

    shapes.graph = SimpleNamespace(replay=replay)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(GraphedBlocks, "_capture", lambda blocks, shapes, run: repeat_instead_of_replaying(shapes, run))
    model, blocks = Toy(), GraphedBlocks()
    model.stages = cuda_graph._graphed(model.stages, blocks)
    return SimpleNamespace(model=model, blocks=blocks, plain=Toy())


def drawn(seed, rows=2, text_tokens=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, TOKENS, WIDTH, generator=generator)
    return (
        latents,
        torch.full((rows,), 100.0 * seed + 50),
        torch.randn(rows, text_tokens, WIDTH, generator=generator),
        None,
    )


def test_a_graph_gives_what_the_blocks_give_for_the_inputs_of_each_call(toy):
    outputs = [(toy.model(*drawn(seed)), toy.plain(*drawn(seed))) for seed in range(6)]
    # At the end: the outputs of one call must outlive the next ones.
    for ours, expected in outputs:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert toy.blocks.describe() == ("CUDA graphs",)


def test_transformers_of_the_same_shapes_have_graphs_of_their_own_weights(toy):
    other, plain = Toy(), Toy()
    for model in (other, plain):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    other.stages = cuda_graph._graphed(other.stages, toy.blocks)
    for seed in range(5):
        torch.testing.assert_close(toy.model(*drawn(seed)), toy.plain(*drawn(seed)), rtol=0, atol=0)
    for seed in range(5):
        torch.testing.assert_close(other(*drawn(seed)), plain(*drawn(seed)), rtol=0, atol=0)
    assert len(toy.blocks._by_key) == 2


def test_shapes_have_a_graph_each(toy):
    for seed in range(5):
        for rows, text_tokens in ((2, 3), (1, 3), (2, 4)):
            given = drawn(seed, rows, text_tokens)
            torch.testing.assert_close(toy.model(*given), toy.plain(*given), rtol=0, atol=0)
    assert len(toy.blocks._by_key) == 3


def test_parts_of_the_blocks_have_graphs_of_their_own(toy):
    """A step cache runs the first blocks, and often not the others."""
    for seed in range(5):
        ours, expected = toy.model.stages(*drawn(seed)), toy.plain.stages(*drawn(seed))
        streams = ours.run_blocks(ours.streams, ours.row_inputs, 0, 1)
        for one, other in zip(streams, expected.run_blocks(expected.streams, expected.row_inputs, 0, 1), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        ours.run_blocks(streams, ours.row_inputs, 1, NUM_BLOCKS)
    assert len(toy.blocks._by_key) == 2


def test_the_least_recent_graphs_go(toy, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    for text_tokens in (3, 4, 3, 5):
        toy.model(*drawn(0, text_tokens=text_tokens))
    assert [shapes.num_runs for shapes in toy.blocks._by_key.values()] == [2, 1]


def test_a_capture_that_fails_is_said_and_changes_nothing(toy, monkeypatch):
    def fail(blocks, shapes, run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(GraphedBlocks, "_capture", fail)
    for seed in range(4):
        torch.testing.assert_close(toy.model(*drawn(seed)), toy.plain(*drawn(seed)), rtol=0, atol=0)
    assert toy.blocks.describe() == ("CUDA graphs failed: operation not permitted when stream is capturing",)


def test_sequences_that_leave_this_rank_as_many_tokens_have_graphs_of_their_own(toy):
    """Of nine or ten tokens over two ranks the first has five, and what it sends differs."""
    for total in (9, 10, 9):
        with sharded_forward(SimpleNamespace(total=total)):
            toy.model(*drawn(0))
    assert len(toy.blocks._by_key) == 2


@pytest.mark.parametrize(
    ("enforce_eager", "device", "use_hsdp"), [(True, "cuda", False), (False, "cpu", False), (False, "cuda", True)]
)
def test_there_are_no_graphs_without_a_gpu_or_compilation_or_with_hsdp(enforce_eager, device, use_hsdp):
    config = SimpleNamespace(
        enforce_eager=enforce_eager,
        torch_device=torch.device(device),
        parallel_config=SimpleNamespace(use_hsdp=use_hsdp),
    )
    assert apply_cuda_graphs(Toy(), config) is None


@pytest.mark.gpu
def test_pictures_of_kernels_are_those_of_their_twins(tmp_path, monkeypatch):
    folder = str(tiny_flux.flux(tmp_path / "flux"))
    params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=4, seed=3, output_type="np")
    with Omni(folder) as omni:
        ours = omni.generate("a red circle", params)[0]
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(linear_method, "on_gpu", lambda x: False)
    with Omni(folder) as omni:
        twins = omni.generate("a red circle", params)[0]
    error = np.square(ours.images[0] - twins.images[0]).mean()
    assert 0 < error < 1e-3, "of pixels in [0, 1]: more than 30 dB"


@pytest.mark.gpu
@pytest.mark.parametrize("side", [64, 96])
def test_compiled_and_graphed_pictures_are_those_of_eager_execution(side, tmp_path):
    folder = str(tiny_flux.flux(tmp_path / "flux"))
    params = OmniDiffusionSamplingParams(height=side, width=side, num_inference_steps=8, seed=3, output_type="np")
    outputs = {}
    for enforce_eager in (True, False):
        with Omni(folder, enforce_eager=enforce_eager) as omni:
            outputs[enforce_eager] = omni.generate(["a red circle", "a blue square"], params)
            model = weakref.ref(omni._engine._executor._worker._runner.pipeline)
        assert model() is None, "compiled code or a graph holds it after the end"
    for one, other in zip(outputs[True], outputs[False], strict=True):
        assert other.receipt.accelerations == ("torch.compile", "CUDA graphs")
        assert np.square(one.images[0] - other.images[0]).mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # float32 is to be exact here
def test_two_experts_give_the_latents_of_eager_execution(tmp_path):
    folder = str(tiny_wan.wan_t2v(tmp_path / "wan"))
    params = OmniDiffusionSamplingParams(
        height=64, width=64, num_frames=5, num_inference_steps=12, seed=1, output_type="latent"
    )
    latents = {}
    for enforce_eager in (True, False):
        with Omni(folder, dtype="float32", enforce_eager=enforce_eager) as omni:
            output = [omni.generate("a cat", params)[0] for _ in range(2)][1]
        latents[enforce_eager] = output.images[0]
    assert output.receipt.accelerations == ("torch.compile", "CUDA graphs")
    torch.testing.assert_close(latents[False], latents[True], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_nothing_in_a_forward_waits_for_the_device(name, quantization):
    transformer, inputs, od_config = one_block(name, quantization)
    with torch.inference_mode():
        transformer(**inputs)
        prepare_modulations(transformer, od_config)
        timesteps = torch.linspace(1000, 100, 10, device="cuda")
        row = ForwardRow(StepMemory(), branch=0, output=0, step_index=3, num_steps=10, timesteps=timesteps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with forward_rows([row]):
                output = transformer(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(output).all()
