from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.attention import selector
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.attention.selector import attention_backend, check_backend, select_backend
from vllm_omni.errors import AttentionBackendError


def inputs(num_heads=4, num_kv_heads=4, queries=5, keys=7, head_size=8):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, num_heads, head_size, generator=generator)
    key, value = torch.randn(2, 2, keys, num_kv_heads, head_size, generator=generator)
    return query, key, value


def plain_attention(query, key, value, scale, allowed):
    """``softmax(q k^T * scale) v`` written out; ``allowed`` is ``[B, S, K]``."""
    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bshd,bkhd->bhsk", query, key) * scale
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhsk,bkhd->bshd", weights, value)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_grouped_heads_match_the_formula(num_kv_heads):
    query, key, value = inputs(num_kv_heads=num_kv_heads)
    layer = Attention(num_heads=4, head_size=8, softmax_scale=0.3, causal=False, num_kv_heads=num_kv_heads)
    expected = plain_attention(query, key, value, 0.3, torch.ones(2, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(layer(query, key, value), expected)


def test_the_default_scale_is_one_over_the_root_of_the_head_size():
    query, key, value = inputs()
    expected = plain_attention(query, key, value, 8**-0.5, torch.ones(2, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(Attention(num_heads=4, head_size=8)(query, key, value), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_key_mask_hides_keys(dtype):
    query, key, value = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7], dtype=dtype)
    output = Attention(num_heads=4, head_size=8)(query, key, value, attn_metadata=AttentionMetadata(attn_mask=mask))
    expected = plain_attention(query, key, value, 8**-0.5, mask.bool()[:, None].expand(2, 5, 7))
    torch.testing.assert_close(output, expected)


def test_a_pair_mask_hides_pairs():
    query, key, value = inputs()
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[..., 0] = True
    output = Attention(num_heads=4, head_size=8)(query, key, value, AttentionMetadata(attn_mask=mask))
    torch.testing.assert_close(output, plain_attention(query, key, value, 8**-0.5, mask[:, 0]))


def test_causal_attention_sees_the_past_only():
    query, key, value = inputs(queries=7)
    layer = Attention(num_heads=4, head_size=8, causal=True)
    expected = plain_attention(query, key, value, 8**-0.5, torch.ones(2, 7, 7, dtype=torch.bool).tril())
    torch.testing.assert_close(layer(query, key, value), expected)
    with pytest.raises(AttentionBackendError, match="exclude each other"):
        layer(query, key, value, AttentionMetadata(attn_mask=torch.ones(2, 7, dtype=torch.bool)))


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(AttentionBackendError, match=r"'XFORMERS' does not exist; choose one of TORCH_SDPA"):
        check_backend("XFORMERS", torch.device("cpu"))


def test_a_layer_keeps_the_backend_that_was_asked_for_when_it_was_built():
    with attention_backend("TORCH_SDPA"):
        layer = Attention(num_heads=4, head_size=8)
    layer(*inputs())
    assert layer.used_backends == {"TORCH_SDPA"}
    if not torch.cuda.is_available():
        with attention_backend("FLASH_ATTN"):
            layer = Attention(num_heads=4, head_size=8)
        with pytest.raises(AttentionBackendError, match="needs an NVIDIA GPU"):
            layer(*inputs())


def test_the_backend_that_was_chosen_is_logged_once(caplog):
    selector._name_of_choice.cache_clear()
    for once in selector.logger.filters:
        once._seen.clear()
    with caplog.at_level("INFO", logger="vllm_omni"):
        for head_size in (8, 16, 8):
            Attention(num_heads=4, head_size=head_size)(*inputs(head_size=head_size))
    assert [record.getMessage() for record in caplog.records] == ["attention backend: TORCH_SDPA"]


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        Attention(num_heads=4, head_size=8, num_kv_heads=3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["TORCH_SDPA", "CUDNN_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_matches_the_formula_on_a_gpu(name, num_kv_heads, causal):
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 130, 8, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 130, num_kv_heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    backend = select_backend(name, query, key, causal, None)
    output = backend.forward(query, key, value, softmax_scale=0.125, causal=causal, attn_mask=None)
    allowed = torch.ones(2, 130, 130, dtype=torch.bool, device="cuda")
    expected = plain_attention(query.float(), key.float(), value.float(), 0.125, allowed.tril() if causal else allowed)
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)
