"""Linear layers in FP8. On a CPU torch emulates their product; the engine refuses it there, the tests do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny_flux, tiny_wan
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.distributed.tensor_parallel import TensorParallelRank
from vllm_omni.diffusion.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    MergedRowParallelLinear,
    ModulationLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm_omni.diffusion.layers.linear_method import linear_method
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.quantization.fp8 import choose_fp8, quantize_rows
from vllm_omni.errors import InvalidConfigError
from vllm_omni.platforms import CpuPlatform

RANKS = [TensorParallelRank(0, 2), TensorParallelRank(1, 2)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(layer_class, *arguments, **keywords):
    with linear_method(choose_fp8):
        return layer_class(*arguments, **keywords)


def loaded(layer, **tensors):
    assert AutoWeightsLoader(layer).load_weights(tensors.items()) == set(dict(layer.named_parameters()))
    return layer


def assert_near(ours, expected, error=0.05):
    assert ((ours - expected).norm() / expected.norm()).item() < error


def test_rows_keep_four_significant_bits_whatever_their_size():
    x = drawn(4, 64) * torch.tensor([[1e-3], [1.0], [1e4], [0.0]])
    values, scales = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    for row in range(3):
        assert_near(values[row].float() * scales[row], x[row])
    assert not values[3].float().any()


def test_a_layer_in_fp8_is_the_layer_up_to_rounding():
    weight, bias, x = drawn(32, 64), drawn(32, seed=1), drawn(2, 5, 64, seed=2)
    layer = loaded(fp8(ColumnParallelLinear, 64, 32), weight=weight, bias=bias)
    assert layer.weight.dtype == torch.float8_e4m3fn
    output = layer(x)
    assert output.shape == (2, 5, 32)
    assert_near(output, F.linear(x, weight, bias))


def test_parts_of_a_fused_layer_are_quantized_where_they_belong():
    parts = {
        f"{name}.weight": 10.0**power * drawn(32, 64, seed=power) for power, name in enumerate(("to_q", "to_k", "to_v"))
    }
    parent, fused = nn.Module(), nn.Module()
    for module in (parent, fused):
        module.to_qkv = fp8(QKVParallelLinear, 64, 16, 2, bias=False)
    AutoWeightsLoader(parent).load_weights(parts.items())
    AutoWeightsLoader(fused).load_weights([("to_qkv.weight", torch.cat(list(parts.values())))])
    x = drawn(3, 64, seed=5)
    for ours, weight in zip(parent.to_qkv.split(parent.to_qkv(x)), parts.values(), strict=True):
        assert_near(ours, F.linear(x, weight))
    torch.testing.assert_close(parent.to_qkv(x), fused.to_qkv(x), rtol=0, atol=0)


def test_ranks_quantize_their_shards():
    weight, x = drawn(64, 64), drawn(3, 64, seed=1)
    columns = [loaded(fp8(ColumnParallelLinear, 64, 64, bias=False, tp=rank), weight=weight) for rank in RANKS]
    assert_near(torch.cat([layer(x) for layer in columns], dim=-1), F.linear(x, weight))
    rows = [loaded(fp8(RowParallelLinear, 64, 64, bias=False, tp=rank), weight=weight) for rank in RANKS]
    partial = [LinearBase.forward(layer, part) for layer, part in zip(rows, x.chunk(2, dim=-1), strict=True)]
    assert_near(sum(partial), F.linear(x, weight))
    merged = [loaded(fp8(MergedRowParallelLinear, (32, 32), 64, bias=False, tp=rank), weight=weight) for rank in RANKS]
    shards = [torch.cat([rank.shard(half, 1, "x") for half in x.chunk(2, dim=-1)], dim=-1) for rank in RANKS]
    partial = [LinearBase.forward(layer, part) for layer, part in zip(merged, shards, strict=True)]
    assert_near(sum(partial), F.linear(x, weight))


def test_of_a_modulation_the_weight_alone_is_quantized():
    weight, bias, x = drawn(48, 64), drawn(48, seed=1), drawn(2, 64, seed=2)
    layer = loaded(fp8(ModulationLinear, 64, 48), weight=weight, bias=bias)
    assert layer.weight.dtype == torch.float8_e4m3fn
    values, scales = quantize_rows(weight)
    torch.testing.assert_close(layer(x), F.linear(x, values.float() * scales, bias))
    assert_near(layer(x), F.linear(x, weight, bias), 0.035)
    assert fp8(ModulationLinear, 60, 64).weight.dtype == torch.float32


def test_embeddings_and_odd_sizes_stay_as_they_are():
    assert fp8(ReplicatedLinear, 64, 64).weight.dtype == torch.float32
    assert fp8(ColumnParallelLinear, 60, 64).weight.dtype == torch.float32
    assert fp8(MergedColumnParallelLinear, 64, (16, 8)).weight.dtype == torch.float32


def test_a_tensor_of_another_shape_is_refused():
    layer = fp8(ColumnParallelLinear, 64, 32, bias=False)
    with pytest.raises(RuntimeError, match=r"weight: shape \[32, 48\] does not fit \[32, 64\]"):
        AutoWeightsLoader(layer).load_weights([("weight", drawn(32, 48))])


@pytest.fixture
def fp8_on_cpu(monkeypatch):
    monkeypatch.setattr(CpuPlatform, "why_no_fp8", lambda platform: None)


FAMILIES = {"flux": (tiny_flux.flux, {}), "wan": (tiny_wan.wan_t2v, {"num_frames": 5, "guidance_scale": 4.0})}


@pytest.mark.parametrize("family", [*FAMILIES, "qwen_image"])
def test_pictures_in_fp8_are_near_those_in_full_precision(family, tmp_path, qwen_folder, fp8_on_cpu):
    build, options = FAMILIES.get(family, (lambda path: qwen_folder, {}))
    folder = str(build(tmp_path / family))
    params = OmniDiffusionSamplingParams(
        height=64, width=64, num_inference_steps=4, seed=3, output_type="np", **options
    )
    with Omni(folder) as omni:
        exact = omni.generate("a red circle", params)[0]
    with Omni(folder, quantization="fp8") as omni:
        quantized = omni.generate("a red circle", params)[0]
    assert exact.receipt.accelerations == ()
    assert quantized.receipt.accelerations == ("fp8",)
    error = np.square(exact.images[0] - quantized.images[0]).mean()
    assert 0 < error < 1e-3, "of pixels in [0, 1]: more than 30 dB"


def test_random_weights_are_quantized_too(qwen_folder, fp8_on_cpu):
    params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=1, seed=3, output_type="np")
    with Omni(str(qwen_folder), load_format="dummy", quantization="fp8") as omni:
        assert np.isfinite(omni.generate("a red circle", params)[0].images[0]).all()


def test_a_device_without_fp8_is_refused(qwen_folder):
    with pytest.raises(InvalidConfigError, match="quantization='fp8' does not run on cpu: a CPU has no FP8 arithmetic"):
        Omni(str(qwen_folder), quantization="fp8")


def test_an_unknown_quantization_is_refused(qwen_folder):
    with pytest.raises(InvalidConfigError, match="quantization='int3' must be one of fp8"):
        Omni(str(qwen_folder), quantization="int3")
