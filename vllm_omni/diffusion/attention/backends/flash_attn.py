"""FlashAttention: version 3 on Hopper (package ``fa3-fwd``), version 2 (package ``flash-attn``) elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionInputs

_PACKAGE_3 = "fa3_fwd_interface"


class FlashAttentionBackend(AttentionBackend):
    """Takes no mask: its kernels know causality and lengths only."""

    name: ClassVar[str] = "FLASH_ATTN"

    def why_unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, the device is {device.type}"
        major = torch.cuda.get_device_capability(device)[0]
        if major < 8:
            return f"it needs compute capability 8.0 or newer, the GPU has {major}.x"
        if _package(major) is None:
            return "install fa3-fwd (Hopper) or flash-attn"
        return None

    def why_unsupported(self, inputs: AttentionInputs) -> str | None:
        if inputs.has_mask:
            return "it takes no attention mask"
        if inputs.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, the inputs are {inputs.dtype}"
        if inputs.head_size > 256 or inputs.head_size % 8:
            return f"it needs a head size that is a multiple of 8 up to 256, got {inputs.head_size}"
        return None

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
        if torch.compiler.is_compiling():
            # The packages' own functions cannot be traced in every release; an operator of ours always can.
            return _flash_attention(query, key, value, softmax_scale, causal)
        return _run(query, key, value, softmax_scale, causal)


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float, causal: bool
) -> torch.Tensor:
    kernel = _kernel(torch.cuda.get_device_capability(query.device)[0])
    return _first(kernel(query, key, value, softmax_scale=softmax_scale, causal=causal))


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some releases return (output, softmax log-sum-exp), others the output alone."""
    return output[0] if isinstance(output, tuple) else output


def flash_attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S, H, D]`` each ``-> output [B, S, H, D], log-sum-exp of the scores [B, H, S]`` in float32."""
    kernel = _kernel(torch.cuda.get_device_capability(query.device)[0])
    output, lse = kernel(query, key, value, softmax_scale=softmax_scale, return_attn_probs=True)[:2]
    return output, lse


_flash_attention = torch.library.custom_op("vllm_omni::flash_attention", _run, mutates_args=())


@_flash_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float, causal: bool) -> torch.Tensor:
    return query.new_empty(query.shape)


def _run_fp8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    output = _kernel(9)(
        query,
        key,
        value,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=query_scale,
        k_descale=key_scale,
        v_descale=value_scale,
    )
    return _first(output)


_fp8_flash_attention = torch.library.custom_op("vllm_omni::fp8_flash_attention", _run_fp8, mutates_args=())


@_fp8_flash_attention.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.bfloat16)


def fp8_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    """``query [B, S, H, D], key and value [B, K, G, D]`` in FP8, scales ``[B, G] -> [B, S, H, D]`` in bfloat16.

    Version 3 only. It keeps the probabilities in FP8 as well, and sums in float32.
    """
    run = _fp8_flash_attention if torch.compiler.is_compiling() else _run_fp8
    return run(query, key, value, query_scale, key_scale, value_scale, softmax_scale, causal)


def has_flash_attention_3(major: int) -> bool:
    """Whether version 3 is what runs on a GPU of compute capability ``major``."""
    return _package(major) == _PACKAGE_3


def _package(major: int) -> str | None:
    """The importable module for a GPU of compute capability ``major``."""
    candidates = (_PACKAGE_3, "flash_attn") if major == 9 else ("flash_attn",)
    return next((name for name in candidates if importlib.util.find_spec(name) is not None), None)


@functools.cache
def _kernel(major: int) -> Callable[..., Any]:
    package = _package(major)
    if package is None:
        raise ImportError("FlashAttention is not installed: install fa3-fwd (Hopper) or flash-attn")
    module = importlib.import_module(package)
    kernel: Callable[..., Any] = module.flash_attn_func
    return kernel
