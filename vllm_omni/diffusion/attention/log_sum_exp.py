"""Attention over some of the keys, in a form that can be merged with attention over others.

Shapes: B batch, S query tokens, K key tokens, H heads, D head size.
"""

from __future__ import annotations

import torch

from vllm_omni.diffusion.attention.backends.flash_attn import flash_attention_with_lse

# Output [B, S, H, D] in float32 and the logarithm of the sum of exponentials of its scores [B, H, S] in float32.
PartialAttention = tuple[torch.Tensor, torch.Tensor]


def attention_with_lse(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_scale: float,
    attn_mask: torch.Tensor | None,
) -> PartialAttention:
    """``query [B, S, H, D], key and value [B, K, H, D], mask [B, K]``, on the kernel of ``backend``."""
    if backend == "FLASH_ATTN":
        output, lse = flash_attention_with_lse(query, key, value, softmax_scale)
        return output.float(), lse
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    bias = None
    if attn_mask is not None:
        # The kernels want rows of a multiple of 16 bytes.
        bias = query.new_full((query.shape[0], 1, 1, -(-num_keys // 16) * 16), float("-inf"))[..., :num_keys]
        bias.masked_fill_(attn_mask.bool()[:, None, None, :], 0)  # in place, or the rows would lose their alignment
        bias = bias.expand(-1, query.shape[1], num_queries, -1)
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=softmax_scale
        )
    elif backend == "CUDNN_ATTN":
        output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, True, 0.0, False, False, scale=softmax_scale
        )[:2]
    else:
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, False, scale=softmax_scale
        )[:2]
    # Some kernels pad the queries, some add a dimension of one.
    lse = lse.reshape(*query.shape[:2], -1)[..., :num_queries]
    if attn_mask is not None:
        # Kernels differ in what they make of rows without a key. Their sum is zero.
        is_empty = ~attn_mask.bool().any(dim=1)
        output = output.masked_fill(is_empty[:, None, None, None], 0)
        lse = lse.masked_fill(is_empty[:, None, None], float("-inf"))
    return output.transpose(1, 2).float(), lse


def merge(first: PartialAttention, second: PartialAttention) -> PartialAttention:
    """Attention over the keys of both (arXiv:2205.14135, section 3.1)."""
    share = torch.sigmoid(second[1] - first[1]).transpose(1, 2).unsqueeze(-1)
    return torch.lerp(first[0], second[0], share), torch.logaddexp(first[1], second[1])
