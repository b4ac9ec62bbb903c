"""Self-attention in FP8 (e4m3): query, key and value in 8 bits, both products in 8 bits, FlashAttention 3 on a GPU.

Layers that normalise and rotate query and key hand out :class:`ScaledHeads` when they are built within
``attention_dtype("fp8")``; :class:`~vllm_omni.diffusion.attention.layer.Attention` computes in FP8 what comes as such.

Shapes: B rows, S query tokens, K key tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from vllm_omni.diffusion.attention.backends.flash_attn import fp8_flash_attention, has_flash_attention_3
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.layers import kernels
from vllm_omni.errors import InvalidConfigError

# FlashAttention 3 keeps the exponentials, which are at most 1, in FP8 as this many times themselves.
_EXPONENTIAL_FACTOR = 256.0
BACKEND_NAME = "FLASH_ATTN_FP8"

_is_fp8: ContextVar[bool] = ContextVar("fp8_attention", default=False)


@dataclass(frozen=True)
class ScaledHeads:
    """Heads in FP8: ``values [B, S, G, D]`` times ``scale [B, G]`` in float32; ``dtype`` is what they were."""

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def restored(self) -> torch.Tensor:
        """``[B, S, G, D]`` in the dtype that they were."""
        # Query heads may share the scale of their key head, and are then more than there are scales.
        scale = self.scale.repeat_interleave(self.values.shape[2] // self.scale.shape[1], dim=1)
        return (self.values.float() * scale[:, None, :, None]).to(self.dtype)


@contextmanager
def attention_dtype(name: str | None) -> Iterator[None]:
    """Self-attention that is built within the block computes in FP8 if ``name`` is "fp8", else in the model's dtype."""
    token = _is_fp8.set(name == "fp8")
    try:
        yield
    finally:
        _is_fp8.reset(token)


def is_fp8_attention() -> bool:
    """Whether :func:`attention_dtype` asks for FP8 at the moment."""
    return _is_fp8.get()


def why_unavailable(device: torch.device) -> str | None:
    """Why ``device`` has no attention in FP8, or None if it has."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"FlashAttention 3 has it for compute capability 9.0 (Hopper), the GPU has {major}.{minor}"
    return None if has_flash_attention_3(major) else "install fa3-fwd"


def check_attention_dtype(od_config: OmniDiffusionConfig) -> None:
    """Raises ``InvalidConfigError`` if attention in FP8 is asked for and cannot run."""
    if od_config.attention_dtype is None:
        return
    device = od_config.torch_device
    reason = why_unavailable(device)
    if reason is None and device.type == "cuda" and od_config.dtype != "bfloat16":
        reason = f"its results are bfloat16, dtype is {od_config.dtype}; use dtype='bfloat16', or leave it out"
    elif reason is None and od_config.attention_backend not in (None, "FLASH_ATTN"):
        reason = f"it is FlashAttention's, attention_backend is {od_config.attention_backend}; leave one of them out"
    if reason is not None:
        raise InvalidConfigError(
            f"attention_dtype={od_config.attention_dtype!r} does not run on {od_config.device}: {reason}",
            option="attention_dtype",
        )


def quantize_heads(x: torch.Tensor) -> ScaledHeads:
    """``[B, S, G, D]`` with the scale of each head of each row, from its largest value."""
    if kernels.take(x):
        from vllm_omni.diffusion.layers.kernels.heads import quantize_heads_op

        values, scale = quantize_heads_op(x)
        return ScaledHeads(values, scale, x.dtype)
    scale = scale_of(x.float().abs().amax(dim=(1, 3)))
    return ScaledHeads(quantized(x, scale[:, None, :, None]), scale, x.dtype)


def scale_of(bound: torch.Tensor) -> torch.Tensor:
    """The scale of values that do not exceed ``bound``: 448 is the largest number of e4m3."""
    # Plain numbers: a compiler takes those that have a name for inputs that may change.
    return bound.clamp(min=1e-12) / 448.0


def quantized(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x`` divided by ``scale``, in FP8."""
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def attend(
    query: ScaledHeads, key: ScaledHeads, value: ScaledHeads, softmax_scale: float, causal: bool
) -> torch.Tensor:
    """``query [B, S, H, D], key and value [B, K, G, D] -> [B, S, H, D]`` in the dtype that they were."""
    if query.values.is_cuda:
        return fp8_flash_attention(
            query.values, key.values, value.values, query.scale, key.scale, value.scale, softmax_scale, causal
        )
    return _twin(query, key, value, softmax_scale, causal)


def _twin(query: ScaledHeads, key: ScaledHeads, value: ScaledHeads, softmax_scale: float, causal: bool) -> torch.Tensor:
    """The same in torch, with the scores of all pairs in memory: the reference, and what runs without a GPU."""
    repeats = query.values.shape[2] // key.values.shape[2]
    q, k, v = (heads.restored().transpose(1, 2).float() for heads in (query, key, value))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * softmax_scale
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    exponentials = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    rounded = (exponentials * _EXPONENTIAL_FACTOR).to(torch.float8_e4m3fn).float() / _EXPONENTIAL_FACTOR
    # The sum is of what was not rounded: FlashAttention 3 has it before it converts.
    return (rounded @ v / exponentials.sum(dim=-1, keepdim=True)).transpose(1, 2).to(query.dtype)
