"""Each layout on two GPUs in processes of its own: one that hangs says where, and the next one runs.

``pytest tests/parallel/test_gpu_layouts.py -m gpu -v``
"""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from benchmarks.rank_pool import RankPool
from tests.parallel.faulty import assert_named_when_it_hangs, faulty_folder
from tests.parallel.generation import generate
from tests.parallel.layouts import TEACACHE, TWO
from tests.parallel.models import requests_of
from vllm_omni.diffusion.attention.log_sum_exp import attention_with_lse, merge
from vllm_omni.diffusion.cuda_graph import GraphedBlocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
_TIMEOUT_S = 20
GRAPHED = {"enforce_eager": False}  # without a compiler: see graphed()
# Options beside the layout, and how far latents may be from those of one GPU, relative to their norm.
CASES = {
    **{name: (layout, {}, 1e-4) for name, layout in TWO.items()},
    "vae2": ({"cfg_parallel_size": 2, "vae_parallel_size": 2}, {"vae_use_tiling": True}, 1e-4),
    **{f"{name}-graphs": (TWO[name], GRAPHED, 1e-4) for name in ("tp2", "u2", "r2", "cfg2")},
    **{f"{name}-nccl": (TWO[name], GRAPHED, 1e-4) for name in ("tp2", "u2", "r2")},
    "u2-tea_cache": (TWO["u2"], TEACACHE, 1e-4),
    # Ranks scale the rows of their own shards, and a token that is rounded otherwise is another token from there on.
    "tp2-fp8": (TWO["tp2"], {"quantization": "fp8", "dtype": "bfloat16"}, 0.1),
    "u2-fp8": (TWO["u2"], {"quantization": "fp8", "dtype": "bfloat16"}, 0.1),
    "r2-bf16": (TWO["r2"], {"dtype": "bfloat16"}, 0.05),
}
# Layouts that move or share the weights of encoders and autoencoders, whose memory is channels-last on a GPU.
PICTURES = {
    f"{model}-{layout}": (model, TWO[layout])
    for model in ("flux", "wan_t2v", "qwen_image_edit_plus")
    for layout in ("tp2", "hsdp2", "u2")
}


class Pools:
    """A pool for each case. Those of the next cases import what takes long while one runs."""

    def __init__(self, names):
        self.names = names
        self.started: dict[str, RankPool] = {}

    def take(self, name):
        place = self.names.index(name)
        for near in self.names[place : place + 4]:
            if near not in self.started:
                self.started[near] = RankPool(2, "cuda", timeout_s=_TIMEOUT_S, preload=[__name__])
        return self.started[name]


@pytest.fixture(scope="module")
def pools(request):
    chosen = [item.callspec.params["name"] for item in request.session.items if "references" in item.fixturenames]
    pools = Pools(chosen)
    yield pools
    for pool in pools.started.values():
        pool.close()


@pytest.fixture(scope="module")
def references():
    """Latents of one GPU, by the options that they were made with."""
    return {}


def graphed(folder, options, prompts, params):
    """What :func:`generate` returns, with blocks as CUDA graphs but not compiled, which would take long."""
    captured, capture = [], GraphedBlocks._capture

    def count(blocks, shapes, run):
        capture(blocks, shapes, run)
        captured.append(shapes)

    with (
        mock.patch.object(torch, "compile", lambda forward, **_: forward),
        mock.patch.object(GraphedBlocks, "_capture", count),
    ):
        outputs = generate(folder, options, prompts, params)
    assert captured, "no graph was captured; the log says why"
    return outputs


def graphed_over_nccl(folder, options, prompts, params):
    """:func:`graphed`, with ranks that leave each other's memory alone."""
    with mock.patch.dict(os.environ, VLLM_OMNI_PEER_MEMORY="0"):
        return graphed(folder, options, prompts, params)


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_give_the_latents_of_one(pools, folders, references, name):
    layout, features, tolerance = CASES[name]
    folder, (prompts, params) = folders("qwen_image"), requests_of("qwen_image")
    if name == "vae2":
        params = [{**params[0], "output_type": "pt", "height": 288, "width": 320, "num_inference_steps": 1}]
        prompts = prompts[:1]
    if features is GRAPHED:
        params = [{**values, "num_inference_steps": 5} for values in params]
    options = {"device": "cuda", "dtype": "float32", **features}
    pool, run = pools.take(name), graphed if features is GRAPHED else generate
    if name.endswith("-nccl"):
        run = graphed_over_nccl
    key = str((options, params))
    if key not in references:
        references[key] = pool.run(run, folder, options, prompts, params)[0]
    for outputs in pool.run(run, folder, {**options, **layout}, prompts, params):
        for mine, other in zip(outputs, references[key], strict=True):
            ours, reference = mine.output.float().cpu(), other.output.float().cpu()  # each on its rank's GPU
            distance = (torch.linalg.norm(ours - reference) / torch.linalg.norm(reference)).item()
            assert distance <= tolerance
    pool.close()


@pytest.mark.parametrize("name", PICTURES)
def test_two_gpus_give_the_pictures_of_one(pools, folders, references, name):
    model, layout = PICTURES[name]
    folder, (prompts, params) = folders(model), requests_of(model)
    arguments = prompts[:1], [{**params[0], "output_type": "pt"}]
    options, pool = {"device": "cuda", "dtype": "float32"}, pools.take(name)
    if model not in references:
        references[model] = pool.run(generate, folder, options, *arguments)[0]
    first, _ = pool.run(generate, folder, {**options, **layout}, *arguments)  # which decodes for all
    (ours,), (reference,) = first, references[model]
    torch.testing.assert_close(ours.output.cpu(), reference.output.cpu(), atol=2e-3, rtol=0)
    assert reference.output.std() > 0.05, "a constant output proves nothing"
    pool.close()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("TORCH_SDPA", torch.float32),
        ("TORCH_SDPA", torch.bfloat16),
        ("CUDNN_ATTN", torch.bfloat16),
        ("FLASH_ATTN", torch.bfloat16),
    ],
)
def test_attention_over_parts_of_the_keys_merges_to_attention_over_all(backend, dtype, masked):
    if backend == "FLASH_ATTN":
        pytest.importorskip("fa3_fwd_interface")
        if masked:
            pytest.skip("it takes no masks")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(2, length, 4, 128, device="cuda", generator=generator).to(dtype) for length in (130, 257, 257)
    )
    mask = torch.ones(2, 257, dtype=torch.bool, device="cuda")
    mask[1, 200:] = False
    scale = 128**-0.5
    scores = (query.float().transpose(1, 2) @ key.float().permute(0, 2, 3, 1)) * scale
    if masked:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    expected = (scores.softmax(-1) @ value.float().transpose(1, 2)).transpose(1, 2)
    parts = [
        attention_with_lse(backend, query, key[:, part], value[:, part], scale, mask[:, part] if masked else None)
        for part in (slice(0, 100), slice(100, 257))
    ]
    output, lse = merge(*parts)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["tp2", "u2", "hsdp2"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_rank_that_hangs_is_named(folder_of_class, layout, eager):
    folder, options = faulty_folder(folder_of_class), {"enforce_eager": eager, **TWO[layout]}
    assert_named_when_it_hangs(folder, ["hang"], device="cuda", **options)
