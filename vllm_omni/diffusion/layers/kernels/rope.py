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
    scales,
    query,
    key,
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
        weight = key_weight
        if is_text:
            weight = text_key_weight
    else:
        num_heads = num_query_heads
        target = query + row * num_query_heads * head_size
        weight = query_weight
        if is_text:
            weight = text_query_weight
    heads = tl.arange(0, HEADS)[:, None]
    features = tl.arange(0, head_size)[None, :]
    mask = heads < num_heads
    place = heads * head_size + features
    values = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
    if ACROSS_HEADS:
        mean_square = tl.sum(tl.sum(values * values, axis=1), axis=0) / (num_heads * head_size)
        weights = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        values = values * tl.rsqrt(mean_square + eps) * weights
    else:
        mean_square = tl.sum(values * values, axis=1)[:, None] / head_size
        weights = tl.load(weight + features).to(tl.float32)
        values = values * tl.rsqrt(mean_square + eps) * weights
    if FP8:
        values = values * (1.0 / tl.load(scales + is_key))
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
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``qkv [B, S, >= (H + G) * D], cos and sin [S, R] in float32 -> query [B, S, H, D], key [B, S, G, D]``.

    The first ``num_text`` tokens are normalised with weights of their own. Weights of one head, ``[D]``, normalise
    each head; weights of all, ``[H * D]`` and ``[G * D]``, normalise them together. With ``scales [2]`` in float32, the
    query's and the key's, both are divided by them and in FP8.
    """
    batch, num_tokens = qkv.shape[:2]
    head_size = 2 * cos.shape[-1]
    rows = qkv.flatten(0, 1)  # a view, unless batches lie apart in memory
    query, key = _outputs(qkv, head_size, num_heads, num_kv_heads, scales)
    heads = triton.next_power_of_2(max(num_heads, num_kv_heads))
    _qk_norm_rope[(batch * num_tokens, 2)](
        rows,
        query_weight,
        key_weight,
        text_query_weight,
        text_key_weight,
        cos,
        sin,
        cos if scales is None else scales,
        query,
        key,
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
        FP8=scales is not None,
        num_warps=max(1, min(8, heads * head_size // 1024)),
    )
    return query, key


def _outputs(
    qkv: torch.Tensor, head_size: int, num_heads: int, num_kv_heads: int, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = qkv.dtype if scales is None else torch.float8_e4m3fn
    query, key = (qkv.new_empty((*qkv.shape[:2], heads, head_size), dtype=dtype) for heads in (num_heads, num_kv_heads))
    return query, key


qk_norm_rope_op = operator(
    qk_norm_rope,
    lambda qkv, query_weight, key_weight, text_query_weight, text_key_weight, cos, sin, heads, kv_heads, *rest: (
        _outputs(qkv, 2 * cos.shape[-1], heads, kv_heads, rest[-1])
    ),
)
