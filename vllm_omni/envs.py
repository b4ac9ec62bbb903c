"""The environment variables that the package reads, each through one function."""

from __future__ import annotations

import os


def attention_backend() -> str | None:
    """``DIFFUSION_ATTENTION_BACKEND``: the attention backend by name; the engine option wins over it."""
    return os.environ.get("DIFFUSION_ATTENTION_BACKEND") or None


def log_level() -> str:
    """``VLLM_OMNI_LOG_LEVEL``: DEBUG, INFO, WARNING (default) or ERROR."""
    return os.environ.get("VLLM_OMNI_LOG_LEVEL", "WARNING").upper()


def peer_memory() -> str:
    """``VLLM_OMNI_PEER_MEMORY``: what ranks exchange by writing to each other's memory and not by NCCL.

    ``ulysses`` (default), ``all`` (what a ring passes on as well, which no GPU has verified yet), or ``0``: nothing.
    """
    return os.environ.get("VLLM_OMNI_PEER_MEMORY", "ulysses")


def api_key() -> str | None:
    """``VLLM_OMNI_API_KEY``: the key that clients of a server must send; the option wins over it."""
    return os.environ.get("VLLM_OMNI_API_KEY") or None
