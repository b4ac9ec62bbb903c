"""Linear layers over inputs in pieces: what a GPU computes in another order is what a CPU computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_omni.diffusion.layers import linear_method
from vllm_omni.diffusion.layers.feedforward import FeedForward
from vllm_omni.diffusion.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, MergedRowParallelLinear
from vllm_omni.diffusion.layers.linear_method import PendingInput
from vllm_omni.diffusion.model_loader.components import fill_with_random_weights
from vllm_omni.diffusion.quantization import fp8

ERRORS = {None: 1e-5, fp8.choose_fp8: 0.08}


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"], autouse=True)
def _branch(request, monkeypatch):
    monkeypatch.setattr(linear_method, "on_gpu", lambda x: request.param)
    monkeypatch.setattr(fp8, "on_gpu", lambda x: request.param)


@pytest.fixture(params=ERRORS, ids=["plain", "fp8"])
def method(request):
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(method, layer_class, *arguments, **keywords):
    """The layer, and the weights and biases that it was given, in full precision."""
    layers = []
    for choose in (method, None):
        with linear_method.linear_method(choose):
            layer = layer_class(*arguments, **keywords)
        fill_with_random_weights(layer)
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.data.copy_(drawn(*parameter.shape, seed=3))
        layers.append(layer)
    return layers[0], dict(layers[1].named_parameters())


def assert_near(ours, expected, method):
    assert ours.shape == expected.shape
    assert ((ours - expected).norm() / expected.norm()).item() < ERRORS[method]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_feed_forward_network_is_its_formula(method, approximate):
    network, weights = built(method, FeedForward, 32, approximate=approximate)
    x = drawn(2, 5, 32)
    hidden = F.gelu(F.linear(x, weights["net.0.proj.weight"], weights["net.0.proj.bias"]), approximate=approximate)
    assert_near(network(x), F.linear(hidden, weights["net.2.weight"], weights["net.2.bias"]), method)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_and_feed_forward_share_two_products(method, batch):
    into, weights = built(method, MergedColumnParallelLinear, 32, (32, 32, 64))
    out, out_weights = built(method, MergedRowParallelLinear, (32, 64), 48)
    x, attended = drawn(batch, 5, 32), drawn(batch, 5, 32, seed=1)
    rest, mlp = into.split_gelu(x)
    first, second = F.linear(x, weights["weight"], weights["bias"]).split([64, 64], dim=-1)
    assert_near(rest, first, method)
    joined = torch.cat([attended, F.gelu(second, approximate="tanh")], dim=-1)
    assert_near(out(mlp.after(attended)), F.linear(joined, out_weights["weight"], out_weights["bias"]), method)


@pytest.mark.parametrize("batch", [1, 2])
def test_two_streams_are_projected_into_one_sequence(method, batch):
    (text, text_weights), (image, weights) = (built(method, ColumnParallelLinear, 32, 48) for _ in range(2))
    image.bias.data.zero_()
    x, y = drawn(batch, 3, 32), drawn(batch, 5, 32, seed=1)
    expected = torch.cat([F.linear(x, text_weights["weight"], text_weights["bias"]), F.linear(y, weights["weight"])], 1)
    assert_near(text.linear_method.apply_joint(text, x, image, y), expected, method)


def test_layers_without_a_bias_take_pieces_too(method):
    layer, weights = built(method, MergedRowParallelLinear, (32, 64), 48, bias=False)
    given = PendingInput(drawn(5, 64), gelu=True).after(drawn(5, 32, seed=1))
    assert_near(layer(given), F.linear(given.joined(), weights["weight"]), method)
