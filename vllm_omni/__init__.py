"""vllm-omni: an engine that serves diffusion models.

The public names load on first use, so that ``vllm-omni --version`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_omni.entrypoints.async_omni import AsyncOmni
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.outputs import OmniRequestOutput

from vllm_omni.version import __version__

__all__ = ["AsyncOmni", "Omni", "OmniDiffusionSamplingParams", "OmniRequestOutput", "__version__"]

_LOCATIONS = {
    "AsyncOmni": "vllm_omni.entrypoints.async_omni",
    "Omni": "vllm_omni.entrypoints.omni",
    "OmniDiffusionSamplingParams": "vllm_omni.inputs.data",
    "OmniRequestOutput": "vllm_omni.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)
