"""Self-attention in FP8. On a CPU its twin in torch runs; the engine refuses it there, the tests do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny_flux, tiny_wan
from tests.diffusion.test_attention import plain_attention
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.attention import fp8
from vllm_omni.diffusion.attention.fp8 import BACKEND_NAME, ScaledHeads, attend, attention_dtype, quantize_heads
from vllm_omni.diffusion.attention.layer import Attention, AttentionMetadata
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.layers.norm import RMSNorm
from vllm_omni.diffusion.layers.rope import QKNormRope, TextNorms
from vllm_omni.errors import InvalidConfigError

TOKENS, HEADS, HEAD_SIZE = 12, 4, 16


def drawn(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(ours, expected):
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def norm(width, seed):
    layer = RMSNorm(width)
    layer.weight.data.copy_(1 + 0.5 * drawn(width, seed=seed))
    return layer


def layers(device="cpu", dtype=torch.float32, head_size=HEAD_SIZE, num_heads=HEADS):
    """Norms of query and key, those of text, and the layer that applies them: in FP8, and not."""
    norms = [norm(head_size, seed).to(device, dtype) for seed in range(4)]
    with attention_dtype("fp8"):
        quantizing = QKNormRope(num_heads)
    return norms[:2], TextNorms(*norms[2:], num_tokens=3), quantizing, QKNormRope(num_heads)


def angles(tokens, head_size=HEAD_SIZE, device="cpu"):
    values = drawn(tokens, head_size // 2, seed=9, device=device)
    return values.cos(), values.sin()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_the_twin_is_attention_up_to_rounding(num_kv_heads, causal):
    query, key, value = (drawn(2, TOKENS, n, HEAD_SIZE, seed=n) for n in (4, num_kv_heads, num_kv_heads))
    allowed = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool)
    expected = plain_attention(query, key, value, 0.25, allowed.tril() if causal else allowed)
    scale = fp8.scale_of(query.abs().amax())
    shared = ScaledHeads(fp8.quantized(query, scale), scale.expand(2, num_kv_heads), query.dtype)
    output = attend(shared, quantize_heads(key), quantize_heads(value), 0.25, causal)
    assert 0.001 < error(output, expected) < 0.06


def test_query_and_key_have_the_scale_that_their_norms_bound_them_by():
    norms, text, quantizing, plain = layers()
    qkv = drawn(2, TOKENS, 3 * HEADS * HEAD_SIZE)
    qkv[0, 5, 1:HEAD_SIZE] = 0  # all of a head in one feature: as large as it can be
    qkv[0, 5, 0] = 1e4
    ours, expected = (layer(qkv, *norms, angles(TOKENS), text) for layer in (quantizing, plain))
    for heads, exact in zip(ours, expected, strict=True):
        assert isinstance(heads, ScaledHeads)
        assert heads.values.dtype == torch.float8_e4m3fn
        assert heads.scale.shape == (2, HEADS)
        assert error(heads.restored(), exact) < 0.035
    largest = [
        max(each.weight.abs().max() for each in pair) for pair in zip(norms, (text.query, text.key), strict=True)
    ]
    for heads, weight in zip(ours[:2], largest, strict=True):
        torch.testing.assert_close(heads.scale, (HEAD_SIZE**0.5 * weight / 448).expand(2, HEADS))
    torch.testing.assert_close(ours[2].scale, expected[2].abs().amax((1, 3)) / 448)


def test_a_row_does_not_depend_on_its_batch():
    norms, text, quantizing, _ = layers()
    qkv = drawn(2, TOKENS, 3 * HEADS * HEAD_SIZE)
    attention = Attention(HEADS, HEAD_SIZE)
    both = attention(*quantizing(qkv, *norms, angles(TOKENS), text))
    alone = attention(*quantizing(qkv[1:], *norms, angles(TOKENS), text))
    torch.testing.assert_close(both[1:], alone)
    assert attention.used_backends == {BACKEND_NAME}


def test_with_a_mask_attention_is_in_the_dtype_of_the_model():
    norms, text, quantizing, _ = layers()
    heads = quantizing(drawn(2, TOKENS, 3 * HEADS * HEAD_SIZE), *norms, angles(TOKENS), text)
    mask = torch.arange(TOKENS).expand(2, -1) < torch.tensor([[7], [TOKENS]])
    attention = Attention(HEADS, HEAD_SIZE)
    output = attention(*heads, AttentionMetadata(attn_mask=mask))
    allowed = mask[:, None].expand(2, TOKENS, TOKENS)
    torch.testing.assert_close(output, plain_attention(*(each.restored() for each in heads), HEAD_SIZE**-0.5, allowed))
    assert attention.used_backends == {"TORCH_SDPA"}


@pytest.fixture
def fp8_on_cpu(monkeypatch):
    monkeypatch.setattr(fp8, "why_unavailable", lambda device: None)


FAMILIES = {"flux": (tiny_flux.flux, {}), "wan": (tiny_wan.wan_t2v, {"num_frames": 5, "guidance_scale": 4.0})}


@pytest.mark.parametrize("family", [*FAMILIES, "qwen_image"])
def test_pictures_are_near_those_in_full_precision(family, tmp_path, qwen_folder, fp8_on_cpu):
    build, options = FAMILIES.get(family, (lambda path: qwen_folder, {}))
    folder = str(build(tmp_path / family))
    params = OmniDiffusionSamplingParams(
        height=64, width=64, num_inference_steps=4, seed=3, output_type="np", **options
    )
    pictures, backends = [], []
    for dtype in (None, "fp8"):
        with Omni(folder, device="cpu", attention_dtype=dtype) as omni:
            (output,) = omni.generate("a red circle", params)
        pictures.append(output.images[0])
        backends.append(output.receipt.attention_backends)
    assert BACKEND_NAME not in backends[0]
    assert BACKEND_NAME in backends[1]
    assert 0 < np.square(pictures[0] - pictures[1]).mean() < 1e-3, "of pixels in [0, 1]: more than 30 dB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_a_device_without_it_is_refused(qwen_folder):
    with pytest.raises(InvalidConfigError, match="attention_dtype='fp8' does not run on cpu: it needs an NVIDIA GPU"):
        Omni(str(qwen_folder), attention_dtype="fp8")


def test_another_backend_is_refused(fp8_on_cpu):
    config = OmniDiffusionConfig.from_options(
        model="m",
        model_class_name="FluxPipeline",
        dtype="float32",
        device="cpu",
        attention_dtype="fp8",
        attention_backend="TORCH_SDPA",
    )
    with pytest.raises(InvalidConfigError, match="attention_backend is TORCH_SDPA; leave one of them out"):
        fp8.check_attention_dtype(config)


def test_another_dtype_is_refused(qwen_folder):
    with pytest.raises(InvalidConfigError, match="attention_dtype='int8' must be one of fp8"):
        Omni(str(qwen_folder), attention_dtype="int8")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4608, 1000])
@pytest.mark.parametrize("head_size", [128, 64])
def test_kernels_are_near_attention_in_float32_and_near_their_twin(tokens, head_size):
    options = {"device": "cuda", "dtype": torch.bfloat16}
    norms, text, quantizing, plain = layers(**options, head_size=head_size)
    qkv = drawn(2, tokens, 3 * HEADS * head_size, **options)
    rope = angles(tokens, head_size, "cuda")
    heads = quantizing(qkv, *norms, rope, text)
    output = Attention(HEADS, head_size)(*heads)
    assert output.dtype == torch.bfloat16
    exact = [x.float() for x in plain(qkv, *norms, rope, text)]
    allowed = torch.ones(2, 1, 1, dtype=torch.bool, device="cuda")
    expected = plain_attention(*exact, head_size**-0.5, allowed)
    assert error(output, expected) < 0.1
    assert error(output, fp8._twin(*heads, head_size**-0.5, False)) < 0.06
