"""Which attention backend runs: the one asked for by name, else the fastest that device and inputs allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionBackend
from vllm_omni.diffusion.attention.backends.sdpa import CudnnAttentionBackend, TorchSdpaBackend
from vllm_omni.errors import AttentionBackendError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (TorchSdpaBackend(), CudnnAttentionBackend(), FlashAttentionBackend())
}
# Measured on an H200 in bf16: cuDNN leads at 1.5k and 4.6k tokens, FlashAttention 3 at 32k.
LONG_SEQUENCE = 16_384

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
    if requested is not None:
        check_backend(requested, query.device)
        reason = _BACKENDS[requested].why_unsupported(query, key, causal, attn_mask)
        if reason is not None:
            raise AttentionBackendError(f"attention backend {requested} cannot take these inputs: {reason}")
        return _BACKENDS[requested]
    for name in _preference(query.device, key.shape[1]):
        backend = _BACKENDS[name]
        if backend.why_unavailable(query.device) is None:
            if backend.why_unsupported(query, key, causal, attn_mask) is None:
                logger.info("attention backend: %s", name, extra={"once": True})
                return backend
    reason = _BACKENDS["TORCH_SDPA"].why_unsupported(query, key, causal, attn_mask)
    raise AttentionBackendError(f"no attention backend takes these inputs: {reason}")


def _preference(device: torch.device, num_keys: int) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("TORCH_SDPA",)
    if num_keys >= LONG_SEQUENCE:
        return ("FLASH_ATTN", "CUDNN_ATTN", "TORCH_SDPA")
    if torch.cuda.get_device_capability(device)[0] >= 9:
        return ("CUDNN_ATTN", "FLASH_ATTN", "TORCH_SDPA")
    return ("FLASH_ATTN", "TORCH_SDPA", "CUDNN_ATTN")
