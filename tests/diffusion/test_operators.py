"""Operators that join products with what stands beside them, against their formula: on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_omni.diffusion.layers import operators
from vllm_omni.diffusion.quantization.fp8 import quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ERROR = 0.006  # bf16 rounds to within 0.004
FP8_ERROR = 0.05


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def assert_near(ours, expected, error=ERROR):
    assert ours.dtype == torch.bfloat16
    assert ours.shape == expected.shape
    assert ((ours.float() - expected).norm() / expected.norm()).item() < error


def exact(x, weight, bias):
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


@pytest.mark.parametrize("tokens", [1, 300])
def test_gelu_of_a_product(tokens):
    x, weight, bias = drawn(2, tokens, 64), drawn(96, 64, seed=1), drawn(96, seed=2)
    assert_near(operators.linear_gelu_op(x, weight, bias), F.gelu(exact(x, weight, bias), approximate="tanh"))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_of_two_parts(has_bias):
    first, second, weight = drawn(2, 300, 64), drawn(2, 300, 128, seed=1), drawn(96, 192, seed=2)
    bias = drawn(96, seed=3) if has_bias else None
    for each in (second, drawn(2, 300, 256, seed=1)[..., 128:]):  # the second part may be a part itself
        expected = exact(torch.cat([first, each], dim=-1), weight, bias)
        assert_near(operators.linear_of_parts_op(first, each, weight, bias), expected)


def test_two_streams_in_one_sequence():
    text, image = drawn(1, 40, 64), drawn(1, 300, 64, seed=1)
    weights, biases = [drawn(96, 64, seed=seed) for seed in (2, 3)], [drawn(96, seed=seed) for seed in (4, 5)]
    expected = torch.cat([exact(*each) for each in zip((text, image), weights, biases, strict=True)], dim=1)
    output = operators.joint_linear_op(text, weights[0], biases[0], image, weights[1], biases[1])
    assert_near(output, expected)
    arguments = []
    for x, weight, bias in zip((text, image), weights, biases, strict=True):
        rows, scales = quantize_rows(x[0])
        weight_rows, weight_scales = quantize_rows(weight)
        arguments += [rows.unsqueeze(0), scales, weight_rows, weight_scales.t(), bias]
    assert_near(operators.joint_scaled_linear_op(*arguments), expected, FP8_ERROR)
