"""What a pipeline must have for the options to take effect, looked at before its weights are read."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.compile import check_compile, repeated_blocks
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import ParallelGroups
from vllm_omni.diffusion.distributed.sequence_plan import check_sequence_plans
from vllm_omni.diffusion.layers.linear import LinearBase
from vllm_omni.diffusion.layers.linear_method import LinearMethod
from vllm_omni.diffusion.layers.rope import QKNormRope
from vllm_omni.errors import FeatureNotAvailableError

_T = TypeVar("_T")


def checked(value: object, expected: type[_T], pipeline: nn.Module, method: str) -> _T:
    """What a method of a pipeline returned. Raises ``TypeError`` if that is something else than ``expected``."""
    if not isinstance(value, expected):
        raise TypeError(f"{type(pipeline).__name__}.{method} returned {value!r:.100}, no {expected.__name__}")
    return value


def check_pipeline(pipeline: nn.Module, od_config: OmniDiffusionConfig, groups: ParallelGroups) -> None:
    """Refuse an option that would change nothing of this pipeline.

    Raises ``FeatureNotAvailableError``, or ``InvalidConfigError`` for a ``_sp_plan`` that names what is not there.
    """
    check_compile(pipeline, od_config)
    if groups.sequence.size > 1:
        check_sequence_plans(pipeline)
    modules = list(pipeline.modules())
    linears = [module for module in modules if isinstance(module, LinearBase)]
    memory = od_config.memory
    # What is asked for, what it needs, and whether that is there.
    needs: list[tuple[str | None, str, bool]] = [
        (
            od_config.attention_backend and f"attention_backend={od_config.attention_backend!r}",
            "Attention of attention/layer.py",
            any(isinstance(module, Attention) for module in modules),
        ),
        (
            od_config.attention_dtype and f"attention_dtype={od_config.attention_dtype!r}",
            "attention that normalises and rotates query and key by QKNormRope",
            any(isinstance(module, QKNormRope) for module in modules),
        ),
        (
            od_config.quantization and f"quantization={od_config.quantization!r}",
            "linear layer of layers/linear.py with numbers of features that it takes",
            any(type(layer.linear_method) is not LinearMethod for layer in linears),
        ),
        (
            f"tensor_parallel_size={groups.tp.size}" if groups.tp.size > 1 else None,
            "linear layer of layers/linear.py that ranks can share",
            any(layer.tp.size > 1 for layer in linears),
        ),
        (
            "use_hsdp=True" if od_config.parallel_config.use_hsdp else None,
            "transformer that names its blocks in _repeated_blocks",
            any(repeated_blocks(pipeline)),
        ),
        (
            "vae_use_tiling=True" if memory.vae_use_tiling else None,
            "autoencoder that decodes in tiles",
            any(getattr(module, "use_tiling", False) for module in modules),
        ),
        (
            "vae_use_slicing=True" if memory.vae_use_slicing else None,
            "autoencoder that decodes pictures one by one",
            any(getattr(module, "use_slicing", False) for module in modules),
        ),
        (
            f"vae_parallel_size={groups.vae.size}" if groups.vae.size > 1 else None,
            "autoencoder with a tiled_decode whose tiles ranks could share",
            any(callable(getattr(module, "tiled_decode", None)) for module in modules),
        ),
    ]
    for option, what, is_there in needs:
        if option and not is_there:
            raise FeatureNotAvailableError(f"{option}: {type(pipeline).__name__} has no {what}; leave the option out")
