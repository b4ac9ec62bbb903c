"""Each Triton kernel against its formula in float32: on a GPU, and without one in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
WIDTHS = [64, 96, 3072] if DEVICE == "cuda" else [96]
# FP8 (e4m3) keeps four significant bits: half a step is a 1/32 of a value. The interpreter of Triton 3.6 halves a value
# that should be rounded up to the next power of two, one in eighty.
FP8_ERROR = 0.035 if DEVICE == "cuda" else 0.12


def kernels(name):
    return import_module(f"vllm_omni.diffusion.layers.kernels.{name}")


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(ours, expected, error=0.006):
    """The norm of the difference over that of ``expected``; bf16 rounds to within 0.004."""
    assert torch.isfinite(ours.float()).all()
    assert ((ours.float() - expected).norm() / expected.norm()).item() < error


def modulated(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.float()) + shift.float()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantize", [False, True])
def test_norm_and_modulation(width, dtype, quantize):
    x, mod_params = drawn(2, 5, width), drawn(2, 3 * width, seed=1, dtype=dtype)
    shift, scale, _ = mod_params.chunk(3, dim=-1)
    output, row_scale = kernels("norm").layer_norm_modulate(x, scale, shift, 1e-6, quantize)
    expected = modulated(x.float(), scale.unsqueeze(1), shift.unsqueeze(1))
    if quantize:
        assert output.dtype == torch.float8_e4m3fn
        assert_near(output.float() * row_scale, expected, FP8_ERROR)
    else:
        assert_near(output, expected)


@pytest.mark.parametrize("groups", [1, 2, 10])
@pytest.mark.parametrize("quantize", [False, True])
def test_gated_residual_norm_and_modulation_by_group(groups, quantize):
    residual, update = drawn(2, 5, 96), drawn(2, 5, 96, seed=1)
    gate, scale, shift = drawn(groups, 3 * 96, seed=2).chunk(3, dim=-1)
    summed, output, row_scale = kernels("norm").gated_residual_norm_modulate(
        residual, gate, update, scale, shift, 1e-6, quantize
    )
    per_row = [values.float().repeat_interleave(10 // groups, dim=0).view(2, 5, 96) for values in (gate, scale, shift)]
    expected = residual.float() + per_row[0] * update.float()
    assert_near(summed, expected)
    output = output.float() * row_scale if quantize else output
    assert_near(output, modulated(summed.float(), *per_row[1:]), FP8_ERROR if quantize else 0.006)


@pytest.mark.parametrize("is_neox_style", [False, True])
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_norm_and_rotation_of_query_and_key(is_neox_style, across_heads, fp8):
    batch, tokens, heads, kv_heads, head_size, num_text = 2, 5, 3, 2, 16, 2
    qkv = drawn(batch, tokens, (heads + 2 * kv_heads) * head_size + 8)
    widths = (heads * head_size, kv_heads * head_size) if across_heads else (head_size, head_size)
    weights = [drawn(width, seed=1 + index) for index, width in enumerate((*widths, *widths))]
    angles = drawn(tokens, head_size // 2, seed=9, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    scales = torch.tensor([0.06, 0.07], device=DEVICE) if fp8 else None
    query, key = kernels("rope").qk_norm_rope(
        qkv, *weights, cos, sin, heads, kv_heads, num_text, 1e-6, is_neox_style, scales
    )
    start = 0
    cases = ((query, heads, weights[0], weights[2]), (key, kv_heads, *weights[1::2]))
    for index, (ours, count, weight, text_weight) in enumerate(cases):
        x = qkv[..., start : start + count * head_size].float().unflatten(-1, (count, head_size))
        start += count * head_size
        variance = x.square().mean((-2, -1) if across_heads else -1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        shape = (count, head_size) if across_heads else (1, head_size)
        text = x[:, :num_text] * text_weight.float().view(shape)
        x = torch.cat([text, x[:, num_text:] * weight.float().view(shape)], dim=1)
        assert ours.shape == x.shape
        if fp8:
            assert ours.dtype == torch.float8_e4m3fn
            ours = ours.float() * scales[index]
        assert_near(ours, rotated(x, cos[:, None], sin[:, None], is_neox_style), FP8_ERROR if fp8 else 0.006)


@pytest.mark.parametrize("tokens", [5, 300])
def test_heads_in_fp8_have_a_scale_each(tokens):
    sizes = torch.tensor([1e-3, 1.0, 200.0], device=DEVICE, dtype=torch.bfloat16)
    x = drawn(2, tokens, 5 * 24).unflatten(-1, (5, 24))[:, :, 2:] * sizes.view(1, 1, 3, 1)
    x = torch.cat([torch.zeros_like(x), x], dim=2).flatten(2)[:, :, 72:].unflatten(-1, (3, 24))  # rows lie apart
    values, scales = kernels("heads").quantize_heads(x)
    torch.testing.assert_close(scales, x.float().abs().amax((1, 3)) / 448, rtol=1e-5, atol=0)
    for head in range(3):
        assert_near(values[:, :, head].float() * scales[:, None, head, None], x[:, :, head].float(), FP8_ERROR)
    assert not kernels("heads").quantize_heads(torch.zeros_like(x))[0].float().any()


def rotated(x, cos, sin, is_neox_style):
    first, second = x.chunk(2, dim=-1) if is_neox_style else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(turned, dim=-1) if is_neox_style else torch.stack(turned, dim=-1).flatten(-2)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_rows_in_fp8_have_a_scale_each(gelu, has_prefix):
    x, prefix = drawn(7, 200)[:, 60:150], drawn(7, 40, seed=1)[:, :30] if has_prefix else None
    values, scales = kernels("quantize").quantize_rows(x, prefix, gelu)
    expected = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    if prefix is not None:
        expected = torch.cat([prefix.float(), expected], dim=1)
    torch.testing.assert_close(scales, expected.abs().amax(1, keepdim=True) / 448, rtol=1e-3, atol=0)
    assert_near(values.float() * scales, expected, FP8_ERROR)


def test_a_row_of_zeros_stays_zero_in_fp8():
    values, scales = kernels("quantize").quantize_rows(
        torch.zeros(2, 64, device=DEVICE, dtype=torch.bfloat16), None, False
    )
    assert not values.float().any()
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 40, 70, 260])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_by_a_weight_in_fp8(rows, has_bias):
    width, features = (3072, 18432) if DEVICE == "cuda" else (300, 48)
    # The interpreter multiplies matrices of no bfloat16.
    dtype = torch.float32 if DEVICE == "cpu" and rows > 4 else torch.bfloat16
    x, weight = drawn(rows, width, dtype=dtype), drawn(features, width, seed=1)
    bias = drawn(features, seed=2) if has_bias else None
    scales = weight.float().abs().amax(1) / 448
    quantized = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
    output = kernels("few_rows").few_rows_linear(x, quantized, scales[None], bias)
    restored = quantized.float() * scales[:, None]
    assert_near(output, F.linear(x.float(), restored, None if bias is None else bias.float()))


@pytest.mark.parametrize(("rows", "tile"), [(70, (128, 64, 1)), (70, (64, 128, 3)), (5, (64, 64, 2))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_in_fp8_whose_sum_is_split(rows, tile, has_bias):
    width, features = (3072, 9216) if DEVICE == "cuda" else (768, 80)
    x, weight = (drawn(*shape, seed=shape[0]).to(torch.float8_e4m3fn) for shape in ((rows, width), (features, width)))
    x_scale, weight_scale = drawn(rows, 1).float().abs(), drawn(1, features, seed=1).float().abs()
    bias = drawn(features, seed=2) if has_bias else None
    expected = x.float() @ weight.float().t() * x_scale * weight_scale
    outputs = []
    for _ in range(2):
        outputs.append(torch.full((rows, features), torch.nan, dtype=torch.bfloat16, device=DEVICE))
        split_sum = kernels("split_sum")
        split_sum.split_sum_linear(x, x_scale, weight, weight_scale, bias, outputs[-1], split_sum.Tile(*tile))
    assert_near(outputs[0], expected if bias is None else expected + bias.float())
    assert torch.equal(*outputs), "the parts are added in their order"


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is no GPU of capability 9.0")
@pytest.mark.parametrize("rows", [128, 512])
def test_the_scaled_product_of_few_rows_is_that_of_cublas(rows, monkeypatch):
    from vllm_omni.diffusion.layers import kernels as package
    from vllm_omni.diffusion.layers.operators import scaled_linear_op

    x, weight = (drawn(*shape, seed=shape[0]).to(torch.float8_e4m3fn) for shape in ((rows, 12288), (3072, 12288)))
    scales = drawn(rows, 1).float().abs(), drawn(1, 3072, seed=1).float().abs()
    arguments = x, scales[0], weight, scales[1], drawn(3072, seed=2), torch.bfloat16
    ours = scaled_linear_op(*arguments)
    monkeypatch.setattr(package, "HAS_TRITON", False)
    assert_near(ours, scaled_linear_op(*arguments).float(), 0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("head_size", [8, 6])
def test_copies_of_rows_in_turn(count, head_size):
    heads = (3, 1, 2, 3)[:count]
    lengths = (5, 2, 6, 3)[:count]
    sources = [drawn(2, 7, 4, head_size, seed=index).transpose(0, 1) for index in range(count)]
    wholes = [torch.zeros(9, 2, 5, head_size, dtype=torch.bfloat16, device=DEVICE) for _ in range(count)]
    expected = [whole.clone() for whole in wholes]
    pairs, twins = (
        [
            (whole[1 : 1 + length, :, 2 : 2 + number], source[:length, :, 1 : 1 + number])
            for whole, source, length, number in zip(targets, sources, lengths, heads, strict=True)
        ]
        for targets in (wholes, expected)
    )
    assert kernels("copy").takes(pairs)
    assert not kernels("copy").takes(pairs * 5)
    kernels("copy").copy_in_turn(pairs)
    for target, source in twins:
        target.copy_(source)
    assert all(torch.equal(ours, other) for ours, other in zip(wholes, expected, strict=True))


def channels_last(*shape, seed=0):
    x = drawn(*shape, seed=seed)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(("channels", "groups"), [(96, 8), (128, 32)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_channels_last_pictures(channels, groups, silu, monkeypatch):
    """With a mean that is large beside what varies, and a last chunk that is not full."""
    module = kernels("channel_norm")
    monkeypatch.setattr(module, "_VALUES", 1024)
    monkeypatch.setattr(module, "_CHUNKS", 4)
    x = channels_last(2, channels, 9, 7) + 20
    weight, bias = drawn(channels, seed=1), drawn(channels, seed=2)
    ours = module.group_norm(x, groups, weight, bias, 1e-6, silu)
    assert ours.stride() == x.stride(), "the next convolution takes it as it is"
    expected = F.group_norm(x.float(), groups, weight.float(), bias.float(), 1e-6)
    assert_near(ours, F.silu(expected) if silu else expected)
    shift = drawn(channels, seed=3)
    shifted = module.group_norm(x, groups, weight, bias, 1e-6, silu, shift)
    expected = F.group_norm(x.float() + shift.float()[:, None, None], groups, weight.float(), bias.float(), 1e-6)
    assert_near(shifted, F.silu(expected) if silu else expected)


@pytest.mark.parametrize("width", [5, 300])
def test_pictures_of_twice_the_side(width):
    x = channels_last(2, 96, 3, width)
    ours = kernels("channel_norm").double_sides(x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, F.interpolate(x, scale_factor=2.0, mode="nearest"), rtol=0, atol=0)


def test_a_sum_with_the_bias_of_channels():
    x, residual, bias = channels_last(2, 96, 9, 7), channels_last(2, 96, 9, 7, seed=1), drawn(96, seed=2)
    expected = x.float() + residual.float() + bias.float()[:, None, None]
    assert_near(kernels("channel_norm").add_to(x, residual, bias), expected)
    assert_near(x, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_norm_of_the_channels_of_each_pixel(has_bias, silu, monkeypatch):
    module = kernels("channel_norm")
    monkeypatch.setattr(module, "_VALUES", 1024)
    x, weight = channels_last(2, 96, 3, 5, 3), drawn(96, 1, 1, 1, seed=1)
    x[0, :, 0, 0, 0] = 0
    bias = drawn(96, 1, 1, 1, seed=2) if has_bias else None
    ours = module.channel_rms_norm(x, weight, bias, 96**0.5, silu)
    assert ours.stride() == x.stride()
    expected = F.normalize(x.float(), dim=1) * 96**0.5 * weight.float() + (0 if bias is None else bias.float())
    assert_near(ours, F.silu(expected) if silu else expected)
