"""RMS normalisation of query and key and their rotation, in one pass from the fused projection's output.

Shapes: B rows, S tokens, T of them text (the first ones), H query heads, G key heads, D head size, R = D / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.operators import operator


@triton.jit
def _qk_norm_rope(
    x,
    query_weight,
    key_weight,
    text_query_weight,
    text_key_weight,
    cos,
    sin,
    query,
    key,
    scales,
    num_tokens,
    num_text,
    eps,
    x_stride: tl.constexpr,
    num_query_heads: tl.constexpr,
    num_key_heads: tl.constexpr,
    head_size: tl.constexpr,
    HEADS: tl.constexpr,
    ACROSS_HEADS: tl.constexpr,
    NEOX: tl.constexpr,
    FP8: tl.constexpr,
):
    half: tl.constexpr = head_size // 2
    row = tl.program_id(0).to(tl.int64)
    token = row % num_tokens
    source = x + row * x_stride
    is_text = token < num_text
    is_key = tl.program_id(1)
    if is_key == 1:
        num_heads = num_key_heads
        source += num_query_heads * head_size
        target = key + row * num_key_heads * head_size
        image_weight = key_weight
        text_weight = text_key_weight
    else:
        num_heads = num_query_heads
        target = query + row * num_query_heads * head_size
        image_weight = query_weight
        text_weight = text_query_weight
    weight = image_weight
    if is_text:
        weight = text_weight
    heads = tl.arange(0, HEADS)[:, None]
    features = tl.arange(0, head_size)[None, :]
    mask = heads < num_heads
    place = heads * head_size + features
    values = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
    if ACROSS_HEADS:
        num_features = num_heads * head_size
        mean_square = tl.sum(tl.sum(values * values, axis=1), axis=0) / num_features
        weights = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        values = values * tl.rsqrt(mean_square + eps) * weights
    else:
        num_features = head_size
        mean_square = tl.sum(values * values, axis=1)[:, None] / head_size
        weights = tl.load(weight + features).to(tl.float32)
        values = values * tl.rsqrt(mean_square + eps) * weights
    if FP8:
        # No value can exceed the norm of all features, and rotation keeps that of a pair: the scale needs no look at
        # other tokens. It is the same for text and image.
        if ACROSS_HEADS:
            weights = tl.maximum(
                tl.abs(tl.load(image_weight + place, mask=mask, other=0.0).to(tl.float32)),
                tl.abs(tl.load(text_weight + place, mask=mask, other=0.0).to(tl.float32)),
            )
        else:
            weights = tl.maximum(
                tl.abs(tl.load(image_weight + features).to(tl.float32)),
                tl.abs(tl.load(text_weight + features).to(tl.float32)),
            )
        largest = tl.max(tl.max(weights, axis=1), axis=0) * tl.sqrt(tl.zeros((), dtype=tl.float32) + num_features)
        scale = tl.maximum(largest, 1e-12) / 448.0
        values = values * (1.0 / scale)
        if row == 0:
            tl.store(scales + is_key, scale)
    angle = token * half + tl.arange(0, half)
    cosine = tl.load(cos + angle)[None, :]
    sine = tl.load(sin + angle)[None, :]
    if NEOX:
        first, second = tl.split(tl.permute(tl.reshape(values, (HEADS, 2, half)), (0, 2, 1)))
    else:
        first, second = tl.split(tl.reshape(values, (HEADS, half, 2)))
    turned = tl.join(first * cosine - second * sine, first * sine + second * cosine)
    if NEOX:
        rotated = tl.reshape(tl.permute(turned, (0, 2, 1)), (HEADS, head_size))
    else:
        rotated = tl.reshape(turned, (HEADS, head_size))
    tl.store(target + place, rotated.to(query.dtype.element_ty), mask=mask)


def qk_norm_rope(
    qkv: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    text_query_weight: torch.Tensor,
    text_key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    num_text: int,
    eps: float,
    is_neox_style: bool,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``qkv [B, S, >= (H + G) * D], cos and sin [S, R] in float32 -> query [B, S, H, D], key [B, S, G, D], scales``.

    The first ``num_text`` tokens are normalised with weights of their own. Weights of one head, ``[D]``, normalise
    each head; weights of all, ``[H * D]`` and ``[G * D]``, normalise them together. With ``fp8``, query and key are in
    FP8, to be multiplied by ``scales [2]`` in float32, the query's and the key's; else scales are empty.
    """
    batch, num_tokens = qkv.shape[:2]
    head_size = 2 * cos.shape[-1]
    rows = qkv.flatten(0, 1)  # a view, unless batches lie apart in memory
    query, key, scales = _outputs(qkv, head_size, num_heads, num_kv_heads, fp8)
    heads = triton.next_power_of_2(max(num_heads, num_kv_heads))
    _qk_norm_rope[(batch * num_tokens, 2)](
        rows,
        query_weight,
        key_weight,
        text_query_weight,
        text_key_weight,
        cos,
        sin,
        query,
        key,
        scales,
        num_tokens,
        num_text,
        eps,
        x_stride=rows.stride(0),
        num_query_heads=num_heads,
        num_key_heads=num_kv_heads,
        head_size=head_size,
        HEADS=heads,
        ACROSS_HEADS=query_weight.shape[0] != head_size,
        NEOX=is_neox_style,
        FP8=fp8,
        num_warps=max(1, min(8, heads * head_size // 1024)),
    )
    return query, key, scales


def _outputs(
    qkv: torch.Tensor, head_size: int, num_heads: int, num_kv_heads: int, fp8: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float8_e4m3fn if fp8 else qkv.dtype
    query, key = (qkv.new_empty((*qkv.shape[:2], heads, head_size), dtype=dtype) for heads in (num_heads, num_kv_heads))
    return query, key, qkv.new_empty(2 if fp8 else 0, dtype=torch.float32)


qk_norm_rope_op = operator(
    qk_norm_rope,
    lambda qkv, query_weight, key_weight, text_query_weight, text_key_weight, cos, sin, heads, kv_heads, *rest: (
        _outputs(qkv, 2 * cos.shape[-1], heads, kv_heads, rest[-1])
    ),
)
