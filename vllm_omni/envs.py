"""The environment variables that the package reads, each through one function."""

from __future__ import annotations

import os


def attention_backend() -> str | None:
    """``DIFFUSION_ATTENTION_BACKEND``: the attention backend by name; the engine option wins over it."""
    return os.environ.get("DIFFUSION_ATTENTION_BACKEND") or None


def log_level() -> str:
    """``VLLM_OMNI_LOG_LEVEL``: DEBUG, INFO, WARNING (default) or ERROR."""
    return os.environ.get("VLLM_OMNI_LOG_LEVEL", "WARNING").upper()


def uses_peer_memory() -> bool:
    """``VLLM_OMNI_PEER_MEMORY``: 0 keeps ranks of one machine from using each other's memory; they use NCCL alone."""
    return os.environ.get("VLLM_OMNI_PEER_MEMORY") != "0"


def torchrun_ranks() -> int | None:
    """``LOCAL_WORLD_SIZE`` where ``torchrun`` started this process: the ranks on this machine. Else None."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def api_key() -> str | None:
    """``VLLM_OMNI_API_KEY``: the key that clients of a server must send; the option wins over it."""
    return os.environ.get("VLLM_OMNI_API_KEY") or None
