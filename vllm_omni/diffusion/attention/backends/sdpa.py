"""Attention by ``torch.nn.functional.scaled_dot_product_attention``: torch's own choice, or its cuDNN kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionInputs


class TorchSdpaBackend(AttentionBackend):
    """Runs everywhere and takes every mask."""

    name: ClassVar[str] = "TORCH_SDPA"

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def why_unsupported(self, inputs: AttentionInputs) -> str | None:
        return "a causal mask and attn_mask exclude each other" if inputs.causal and inputs.has_mask else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=_broadcastable(attn_mask),
            is_causal=causal,
            scale=softmax_scale,
            # Not the comparison itself: where the number of heads is a symbol of a trace, that is no bool.
            enable_gqa=True if query.shape[2] != key.shape[2] else False,  # noqa: SIM210
        )
        return output.transpose(1, 2)


class CudnnAttentionBackend(TorchSdpaBackend):
    """The cuDNN kernel alone: an input that it cannot take is refused rather than given to another kernel."""

    name: ClassVar[str] = "CUDNN_ATTN"

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, the device is {device.type}"
        if not torch.backends.cudnn.is_available():
            return "torch was built without cuDNN"
        major = torch.cuda.get_device_capability(device)[0]
        return None if major >= 8 else f"it needs compute capability 8.0 or newer, the GPU has {major}.x"

    def why_unsupported(self, inputs: AttentionInputs) -> str | None:
        if inputs.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, the inputs are {inputs.dtype}"
        if inputs.head_size > 128 or inputs.head_size % 8:
            return f"it needs a head size that is a multiple of 8 up to 128, got {inputs.head_size}"
        return super().why_unsupported(inputs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().forward(query, key, value, softmax_scale=softmax_scale, causal=causal, attn_mask=attn_mask)


def _broadcastable(attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as SDPA takes it: ``[B, K] -> [B, 1, 1, K]``, integers as booleans."""
    if attn_mask is None:
        return None
    if not attn_mask.is_floating_point():
        attn_mask = attn_mask.bool()
    return attn_mask[:, None, None, :].bool() if attn_mask.dim() == 2 else attn_mask
