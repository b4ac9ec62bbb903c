"""Compiled blocks give what eager ones give. Compilation takes tens of seconds, so one family stands for all."""

from __future__ import annotations

import gc
import os
import shutil
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny_flux, tiny_qwen_edit, tiny_wan
from tests.tiny_qwen_edit import picture
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.attention.backends import flash_attn
from vllm_omni.diffusion.compile import CompiledBlocks, _note_compilers, apply_compile
from vllm_omni.diffusion.distributed.rank_status import RankStatus, rank_status, waiting_for
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.errors import AttentionBackendError, FeatureNotAvailableError, GenerationError

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"
)
SIZES = [(64, 96), (32, 64), (64, 64)]
PICTURE = {"image": picture(64, 48)}
# family: (checkpoint, classes of blocks, parameters, pictures)
FAMILIES = {
    "qwen_image_edit_plus": (tiny_qwen_edit.qwen_image_edit_plus, 1, {"true_cfg_scale": 3.0}, PICTURE),
    "flux": (tiny_flux.flux, 2, {"true_cfg_scale": 3.0}, None),
    "flux_kontext": (tiny_flux.flux_kontext, 2, {"true_cfg_scale": 3.0}, PICTURE),
    "wan_t2v": (tiny_wan.wan_t2v, 1, {"num_frames": 5, "guidance_scale": 4.0}, None),
    "wan_ti2v": (tiny_wan.wan_ti2v, 1, {"num_frames": 5, "guidance_scale": 4.0}, None),
    "wan_i2v": (tiny_wan.wan_i2v, 1, {"num_frames": 5, "guidance_scale": 4.0}, PICTURE),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Each test starts without compiled code, and leaves none for tests that count."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(omni, height, width, prompt="a cat", pictures=None, **params):
    params = {"num_inference_steps": 2, "seed": 1, "output_type": "latent", **params}
    prompt = {"prompt": prompt, "negative_prompt": "blurry", "multi_modal_data": pictures}
    (output,) = omni.generate(prompt, OmniDiffusionSamplingParams(height=height, width=width, **params))
    return output


def num_graphs():
    return counters["stats"]["unique_graphs"]


def assert_compiled_equals_eager(folder, num_classes, **params):
    with Omni(str(folder)) as eager, Omni(str(folder), enforce_eager=False) as compiled:
        for place, (height, width) in enumerate(SIZES):
            before = num_graphs()
            output = generate(compiled, height, width, prompt="a red circle" if place == 2 else "a cat", **params)
            expected = generate(eager, height, width, prompt="a red circle" if place == 2 else "a cat", **params)
            assert (output.images[0] - expected.images[0]).abs().max() <= 1e-5
            assert output.receipt.accelerations == ("torch.compile",)
            assert output.receipt.attention_backends == expected.receipt.attention_backends == ("TORCH_SDPA",)
            assert expected.receipt.accelerations == ()
            graphs = num_graphs() - before
            if place == 0:
                assert graphs >= num_classes, "blocks were compiled"
            else:
                assert graphs <= num_classes, "another size compiles each class of blocks at most once more"
        before = num_graphs()
        generate(compiled, *SIZES[0], **params)
        assert num_graphs() == before, "what was compiled stays"


@needs_compiler
def test_compiled_blocks_equal_eager_ones_and_another_size_recompiles_at_most_once(qwen_folder):
    assert_compiled_equals_eager(qwen_folder, 1, true_cfg_scale=3.0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family, tmp_path):
    build, num_classes, params, pictures = FAMILIES[family]
    assert_compiled_equals_eager(build(tmp_path / "model"), num_classes, pictures=pictures, **params)


def test_all_blocks_of_a_class_and_all_pipelines_share_one_graph(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_without_code)
    for _ in range(2):
        with Omni(str(qwen_folder), enforce_eager=False) as omni:
            for height, width in SIZES:
                for prompt in ("a cat", "a red circle left of a blue square"):
                    output = generate(omni, height, width, prompt=prompt, true_cfg_scale=3.0)
            assert output.receipt.attention_backends == ("TORCH_SDPA",)
        assert num_graphs() == 1


def test_code_that_cannot_be_compiled_runs_eagerly_and_the_receipt_says_so(qwen_folder, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", _failing_compile)
    with Omni(str(qwen_folder)) as eager, Omni(str(qwen_folder), enforce_eager=False) as omni:
        output, expected = generate(omni, 32, 48), generate(eager, 32, 48)
    assert torch.equal(output.images[0], expected.images[0])
    (text,) = output.receipt.accelerations
    assert text.startswith("torch.compile failed, eager: ")
    assert "no compiler on this machine" in text + caplog.text


def test_past_the_limit_of_recompilations_the_receipt_says_that_some_shapes_run_eagerly(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_each_shape)
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        Omni(str(qwen_folder)) as eager,
        Omni(str(qwen_folder), enforce_eager=False) as omni,
    ):
        assert generate(omni, 32, 48).receipt.accelerations == ("torch.compile",)
        output, expected = generate(omni, 48, 48), generate(eager, 48, 48)
        assert torch.equal(output.images[0], expected.images[0])
        expected_text = "torch.compile, eager for some shapes: limit of recompilations reached"
        assert output.receipt.accelerations == (expected_text,)


def test_inputs_that_cannot_run_at_all_do_not_end_compilation(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_without_code)
    with Omni(str(qwen_folder), enforce_eager=False) as omni:
        blocks = omni._engine._executor._worker._runner.pipeline.transformer.transformer_blocks
        with pytest.raises(RuntimeError):
            blocks[0](torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(1, 3), (torch.zeros(8, 2),) * 2, None)
        assert generate(omni, 32, 64).receipt.accelerations == ("torch.compile",)


def test_batches_with_and_without_padding_stay_within_the_limit_of_recompilations(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_without_code)
    params = OmniDiffusionSamplingParams(num_inference_steps=1, seed=1, height=32, width=64)
    prompts = ["a cat", "a cat holding a sign", "a red circle left of a small blue square"]
    with Omni(str(qwen_folder), enforce_eager=False) as omni:
        for batch in (prompts[:1], prompts[1:2], prompts[:1] * 2, prompts[:2], prompts, prompts[1:]):
            outputs = omni.generate(batch, params)
    assert outputs[0].receipt.accelerations == ("torch.compile",)
    assert num_graphs() <= 3, "one row, several rows, and several rows with a mask"


def test_closing_frees_a_compiled_model(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_without_code)
    omni = Omni(str(qwen_folder), enforce_eager=False)
    generate(omni, 32, 64)
    transformer = omni._engine._executor._worker._runner.pipeline.transformer
    weights = [weakref.ref(transformer), weakref.ref(transformer.transformer_blocks[0].attn.to_qkv.weight)]
    del transformer
    omni.close()
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_an_attention_backend_that_cannot_run_is_still_named(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile_without_code)
    with Omni(str(qwen_folder), enforce_eager=False) as omni:
        for block in omni._engine._executor._worker._runner.pipeline.transformer.transformer_blocks:
            block.attn.attn._requested = "FLASH_ATTN"
        with pytest.raises(GenerationError) as caught:
            generate(omni, 32, 48)
    assert isinstance(caught.value.outputs[0].error, AttentionBackendError)


def test_a_rank_tells_when_compilers_work_for_it_and_when_their_code_does():
    status, seen = RankStatus(), []

    def backend(graph, _inputs):
        seen.append(status.waiting_for)
        return lambda *args: (seen.append(status.waiting_for), graph(*args))[1]

    for _ in range(2):
        _note_compilers()
    double = torch.compile(lambda x: x * 2, backend=backend)
    with rank_status(status), waiting_for("compiled"):
        double(torch.ones(3))
    assert seen == ["compiler", "compiled"]
    assert status.waiting_for is None


@pytest.mark.parametrize("names", [[], ["NoSuchBlock"]])
def test_a_model_without_repeated_blocks_is_refused_before_its_weights_are_read(
    qwen_folder, tmp_path, monkeypatch, names
):
    from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

    folder = shutil.copytree(qwen_folder, tmp_path / "model")
    for path in (folder / "transformer").glob("*.safetensors"):
        path.rename(path.with_suffix(".gone"))
    monkeypatch.setattr(QwenImageTransformer2DModel, "_repeated_blocks", names)
    with pytest.raises(FeatureNotAvailableError, match=r"enforce_eager=False: .*_repeated_blocks"):
        Omni(str(folder), enforce_eager=False)


def test_eager_execution_is_the_default_and_leaves_the_pipeline_alone(qwen_folder):
    block = torch.nn.Linear(2, 2)
    assert apply_compile(block, configure(str(qwen_folder), {})) is None
    assert "forward" not in vars(block)
    assert CompiledBlocks().describe() == "torch.compile"


def test_flash_attention_is_one_operator_of_a_trace(monkeypatch):
    def kernel(query, key, value, softmax_scale, causal):
        states = (x.transpose(1, 2) for x in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=causal, scale=softmax_scale)
        return output.transpose(1, 2).contiguous(), "log-sum-exp"

    monkeypatch.setattr(flash_attn, "_kernel", lambda major: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    states = torch.randn(3, 1, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    backend = flash_attn.FlashAttentionBackend()

    def run(query, key, value):
        return backend.forward(query, key, value, softmax_scale=0.3, causal=False, attn_mask=None)

    torch.testing.assert_close(_compile_without_code(run, fullgraph=True, dynamic=True)(*states), run(*states))


_compile = torch.compile


def _compile_without_code(function, **options):
    """Trace, and run the graph as it is: without the seconds that code generation takes."""
    return _compile(function, **options, backend="eager")


def _compile_each_shape(function, **options):
    return _compile(function, fullgraph=options["fullgraph"], dynamic=False, backend="eager")


def _failing_compile(function, **options):
    def backend(graph, inputs):
        raise OSError("no compiler on this machine")

    return _compile(function, **options, backend=backend)
