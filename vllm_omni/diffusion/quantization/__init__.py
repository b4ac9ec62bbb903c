"""Linear layers in fewer bits. ``quantized_linears`` is held while a pipeline is built; models know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.layers.linear_method import linear_method
from vllm_omni.diffusion.quantization.fp8 import choose_fp8
from vllm_omni.errors import InvalidConfigError
from vllm_omni.platforms import get_platform

_METHODS = {"fp8": choose_fp8}


def check_quantization(od_config: OmniDiffusionConfig) -> None:
    """Raises ``InvalidConfigError`` if the device cannot compute in the precision that the configuration asks for."""
    if od_config.quantization is None:
        return
    reason = get_platform(od_config.torch_device).why_no_fp8()
    if reason is not None:
        raise InvalidConfigError(
            f"quantization={od_config.quantization!r} does not run on {od_config.device}: {reason}; leave it out",
            option="quantization",
        )
    if od_config.torch_device.type == "cuda" and od_config.dtype != "bfloat16":
        raise InvalidConfigError(
            f"quantization={od_config.quantization!r} computes with bfloat16 on a GPU, dtype is {od_config.dtype};"
            " use dtype='bfloat16'",
            option="quantization",
        )


@contextmanager
def quantized_linears(od_config: OmniDiffusionConfig) -> Iterator[None]:
    """Linear layers that are built within the block are quantized as the configuration says."""
    with linear_method(None if od_config.quantization is None else _METHODS[od_config.quantization]):
        yield
