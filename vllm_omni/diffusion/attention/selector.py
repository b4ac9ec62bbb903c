"""Which attention backend runs: the one asked for by name, else the fastest that device and inputs allow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionInputs
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionBackend, has_flash_attention_3
from vllm_omni.diffusion.attention.backends.sdpa import CudnnAttentionBackend, TorchSdpaBackend
from vllm_omni.errors import AttentionBackendError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (TorchSdpaBackend(), CudnnAttentionBackend(), FlashAttentionBackend())
}

_requested: ContextVar[str | None] = ContextVar("requested_attention_backend", default=None)


@contextmanager
def attention_backend(name: str | None) -> Iterator[None]:
    """Attention layers that are built within the block use this backend; None leaves the choice open."""
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """The backend that :func:`attention_backend` asks for at the moment."""
    return _requested.get()


def check_backend(name: str | None, device: torch.device) -> None:
    """Raises ``AttentionBackendError`` if the backend that was asked for by name cannot run on ``device``."""
    if name is None:
        return
    if name not in _BACKENDS:
        raise AttentionBackendError(f"attention backend {name!r} does not exist; choose one of {', '.join(_BACKENDS)}")
    reason = _BACKENDS[name].why_unavailable(device)
    if reason is not None:
        usable = [other for other, backend in _BACKENDS.items() if backend.why_unavailable(device) is None]
        raise AttentionBackendError(f"attention backend {name} cannot run here: {reason}. Usable: {', '.join(usable)}")


def select_backend(
    requested: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    attn_mask: torch.Tensor | None,
) -> AttentionBackend:
    """The backend for these inputs. An explicit choice that cannot run them raises ``AttentionBackendError``."""
    has_mask = attn_mask is not None
    return _BACKENDS[_choose(requested, query.device, query.dtype, query.shape[-1], causal, has_mask)]


def _choice_of_constants(
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    causal: bool,
    has_mask: bool,
) -> str:
    return _name_of_choice(requested, AttentionInputs(device, dtype, head_size, causal, has_mask))


# A compiler runs the choice as it is and keeps the result: its arguments are constants of a trace.
_choose: Callable[..., str] = torch.compiler.assume_constant_result(_choice_of_constants)


@functools.cache
def _name_of_choice(requested: str | None, inputs: AttentionInputs) -> str:
    device = inputs.device
    if requested is not None:
        check_backend(requested, device)
        reason = _BACKENDS[requested].why_unsupported(inputs)
        if reason is not None:
            raise AttentionBackendError(f"attention backend {requested} cannot take these inputs: {reason}")
        return requested
    for name in _preference(inputs):
        backend = _BACKENDS[name]
        if backend.why_unavailable(device) is None and backend.why_unsupported(inputs) is None:
            logger.info("attention backend: %s", name, extra={"once": True})
            return name
    reason = _BACKENDS["TORCH_SDPA"].why_unsupported(inputs)
    raise AttentionBackendError(f"no attention backend takes these inputs: {reason}")


def _preference(inputs: AttentionInputs) -> tuple[str, ...]:
    if inputs.device.type != "cuda":
        return ("TORCH_SDPA",)
    major = torch.cuda.get_device_capability(inputs.device)[0]
    # Measured on an H100 in bf16, heads of 128 (benchmarks/kernels.py): FlashAttention 3 leads cuDNN by 1 to 8 % from
    # 1k to 16k tokens, and by 22 % at 32k. FlashAttention 2 is far behind both.
    if major >= 9 and not has_flash_attention_3(major):
        return ("CUDNN_ATTN", "FLASH_ATTN", "TORCH_SDPA")
    return ("FLASH_ATTN", "CUDNN_ATTN", "TORCH_SDPA")
