"""Attention of two streams of tokens with weights of their own over each other (MM-DiT, arXiv:2403.03206).

Shapes: B rows, T text tokens, I image tokens, S = T + I, H heads of this rank, D head size, E width of the model.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.layers.linear import QKVParallelLinear, RowParallelLinear, both_summed
from vllm_omni.diffusion.layers.norm import RMSNorm
from vllm_omni.diffusion.layers.rope import QKNormRope, TextNorms


class JointAttention(nn.Module):
    """Normalised and rotated heads of text and image, attended together, text first. Named as diffusers names them."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.to_qkv = QKVParallelLinear(dim, head_dim, num_heads)
        self.add_qkv_proj = QKVParallelLinear(
            dim, head_dim, num_heads, checkpoint_names=("add_q_proj", "add_k_proj", "add_v_proj")
        )
        self.norm_q = RMSNorm(head_dim, eps)
        self.norm_k = RMSNorm(head_dim, eps)
        self.norm_added_q = RMSNorm(head_dim, eps)
        self.norm_added_k = RMSNorm(head_dim, eps)
        self.qk_norm_rope = QKNormRope(self.to_qkv.num_heads)
        self.attn = Attention(self.to_qkv.num_heads, head_dim)
        self.to_out = nn.ModuleList([RowParallelLinear(dim, dim)])
        self.to_add_out = RowParallelLinear(dim, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attn_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``image [B, I, E], text [B, T, E], rope [S, D / 2] x 2, mask [B, S] -> image, text`` of the same shapes."""
        num_text = encoder_hidden_states.shape[1]
        method = self.to_qkv.linear_method
        qkv = method.apply_joint(self.add_qkv_proj, encoder_hidden_states, self.to_qkv, hidden_states)
        text_norms = TextNorms(self.norm_added_q, self.norm_added_k, num_text)
        query, key, value = self.qk_norm_rope(qkv, self.norm_q, self.norm_k, rope, text_norms)
        output = self.attn(query, key, value, attn_metadata=AttentionMetadata(attn_mask=attn_mask)).flatten(2)
        text_output, image_output = output[:, :num_text], output[:, num_text:]
        return both_summed(self.to_out[0], image_output, self.to_add_out, text_output)
