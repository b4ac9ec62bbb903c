from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.distributed.tensor_parallel import TensorParallelRank, tensor_parallel_rank
from vllm_omni.diffusion.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm_omni.diffusion.layers.norm import RMSNorm, gated_residual, layer_norm_modulate
from vllm_omni.diffusion.layers.rope import QKNormRope, RotaryEmbedding, TextNorms, rope_angles
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader

RANKS = [TensorParallelRank(0, 2), TensorParallelRank(1, 2)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded(layer, **tensors):
    names = AutoWeightsLoader(layer).load_weights(tensors.items())
    assert names == set(dict(layer.named_parameters()))
    return layer


def test_replicated_linear_is_torchs_linear():
    weight, bias, x = drawn(5, 4), drawn(5, seed=1), drawn(2, 3, 4, seed=2)
    layer = loaded(ReplicatedLinear(4, 5), weight=weight, bias=bias)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


def test_column_parallel_ranks_hold_consecutive_parts_of_the_output():
    weight, bias, x = drawn(6, 4), drawn(6, seed=1), drawn(2, 4, seed=2)
    parts = [loaded(ColumnParallelLinear(4, 6, tp=rank), weight=weight, bias=bias)(x) for rank in RANKS]
    torch.testing.assert_close(torch.cat(parts, dim=-1), F.linear(x, weight, bias))


def test_row_parallel_ranks_hold_partial_products():
    weight, x = drawn(3, 8), drawn(2, 8, seed=2)
    layers = [loaded(RowParallelLinear(8, 3, bias=False, tp=rank), weight=weight) for rank in RANKS]
    partial = [F.linear(part, layer.weight) for part, layer in zip(x.chunk(2, dim=-1), layers, strict=True)]
    torch.testing.assert_close(sum(partial), F.linear(x, weight))


def test_the_first_rank_alone_adds_the_bias_of_a_row_parallel_layer():
    weight, bias = drawn(3, 8), drawn(3, seed=1)
    layers = [loaded(RowParallelLinear(8, 3, tp=rank), weight=weight, bias=bias) for rank in RANKS]
    torch.testing.assert_close(sum(layer.bias for layer in layers), bias)


def test_qkv_takes_its_heads_from_three_tensors_or_from_one():
    query, key, value = drawn(16, 8), drawn(8, 8, seed=1), drawn(8, 8, seed=2)
    for rank in [TensorParallelRank(), *RANKS]:
        parent = nn.Module()
        parent.to_qkv = QKVParallelLinear(8, 4, 4, 2, bias=False, tp=rank)
        parts = {"to_q.weight": query, "to_k.weight": key, "to_v.weight": value}
        assert AutoWeightsLoader(parent).load_weights(parts.items()) == {"to_qkv.weight"}
        expected = torch.cat([rank.shard(tensor, 0, "rows") for tensor in (query, key, value)])
        torch.testing.assert_close(parent.to_qkv.weight.data, expected)
        parent.to_qkv.weight.data.zero_()
        AutoWeightsLoader(parent).load_weights([("to_qkv.weight", torch.cat([query, key, value]))])
        torch.testing.assert_close(parent.to_qkv.weight.data, expected)
        heads = parent.to_qkv.heads(drawn(1, 3, 8))
        assert [tuple(part.shape) for part in heads] == [
            (1, 3, 4 // rank.size, 4),
            (1, 3, 2 // rank.size, 4),
            (1, 3, 2 // rank.size, 4),
        ]


def test_a_fused_layer_that_lacks_a_part_is_not_complete():
    parent = nn.Module()
    parent.gate_up = MergedColumnParallelLinear(4, (6, 6), bias=False, checkpoint_names=("gate_proj", "up_proj"))
    assert AutoWeightsLoader(parent).load_weights([("gate_proj.weight", drawn(6, 4))]) == set()


def test_layers_shard_for_the_rank_of_the_context():
    with tensor_parallel_rank(RANKS[1]):
        assert ColumnParallelLinear(4, 6).weight.shape == (3, 4)
    assert ColumnParallelLinear(4, 6).weight.shape == (6, 4)


def test_a_size_that_does_not_divide_says_what_would():
    with pytest.raises(
        ValueError, match=r"num_heads=3 does not divide by tensor_parallel_size=2; these would: \[1, 3\]"
    ):
        QKVParallelLinear(12, 4, 3, tp=RANKS[0])


def test_rotation_matches_complex_arithmetic():
    x, angles = drawn(2, 5, 3, 8), rope_angles(torch.arange(5), 8)
    rotated = RotaryEmbedding()(x, angles.cos(), angles.sin())
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotated, torch.view_as_real(turned).flatten(-2))


def test_neox_rotation_is_the_other_one_with_features_reordered():
    x, angles = drawn(2, 5, 3, 8), rope_angles(torch.arange(5), 8)
    interleaved = x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    expected = RotaryEmbedding()(interleaved, angles.cos(), angles.sin())
    rotated = RotaryEmbedding(is_neox_style=True)(x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotated.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), expected)


def normalized_and_rotated(x, norm, angles):
    heads = norm(x) if norm.weight.shape[0] == x.shape[-1] else norm(x.flatten(2)).unflatten(-1, x.shape[2:])
    return RotaryEmbedding()(heads, angles.cos(), angles.sin())


@pytest.mark.parametrize("across_heads", [False, True])
def test_norm_and_rotation_of_a_fused_projection_are_those_of_its_parts(across_heads):
    query, key, value = drawn(2, 5, 4, 8), drawn(2, 5, 2, 8, seed=1), drawn(2, 5, 2, 8, seed=2)
    angles = rope_angles(torch.arange(5), 8)
    norms = [RMSNorm(32 if across_heads else 8), RMSNorm(16 if across_heads else 8)]
    for index, norm in enumerate(norms):
        norm.weight.data = drawn(*norm.weight.shape, seed=5 + index)
    qkv = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
    parts = QKNormRope(4, 2)(qkv, *norms, (angles.cos(), angles.sin()))
    for ours, x, norm in zip(parts, (query, key), norms, strict=False):
        torch.testing.assert_close(ours, normalized_and_rotated(x, norm, angles))
    torch.testing.assert_close(parts[2], value)


def test_text_tokens_have_norms_of_their_own():
    qkv, angles = drawn(2, 5, 3 * 8), rope_angles(torch.arange(5), 8)
    norms = [RMSNorm(8) for _ in range(4)]
    for index, norm in enumerate(norms):
        norm.weight.data = drawn(8, seed=5 + index)
    parts = QKNormRope(1)(qkv, *norms[:2], (angles.cos(), angles.sin()), TextNorms(*norms[2:], 2))
    for ours, x, norm, text_norm in zip(parts, qkv.unflatten(-1, (3, 1, 8)).unbind(2), norms, norms[2:], strict=False):
        expected = torch.cat(
            [
                normalized_and_rotated(x, each, angles)[:, part]
                for each, part in ((text_norm, slice(2)), (norm, slice(2, None)))
            ],
            dim=1,
        )
        torch.testing.assert_close(ours, expected)


def test_modulation_and_gate_are_the_formulas():
    x, scale, shift = drawn(2, 3, 8), drawn(2, 1, 8, seed=1), drawn(2, 1, 8, seed=2)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(layer_norm_modulate(x, scale, shift, 1e-6), expected)
    torch.testing.assert_close(gated_residual(x, scale, expected), x + scale * expected)
