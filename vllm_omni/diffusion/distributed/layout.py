"""How many ranks share the work, and whether model, options and machine allow it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_omni import envs
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError

# Ranks may share the cores of a CPU, to try a layout; more of them than this only use up its memory.
_LEAST_CPU_RANKS, _CPU_RANKS_PER_CORE = 16, 4


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the groups that the ranks of one replica form. Replicas (``data``) share nothing."""

    MESH_DIMS: ClassVar[tuple[str, ...]] = ("cfg", "hsdp", "ring", "ulysses", "tp")

    data: int = 1
    cfg: int = 1
    hsdp: int = 1  # ranks that hold different weights and compute the same
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    vae: int = 1  # of the other ranks, those that decode

    @classmethod
    def from_config(cls, config: DiffusionParallelConfig) -> ParallelLayout:
        sequence = config.ring_degree * config.ulysses_degree
        return cls(
            data=config.data_parallel_size,
            cfg=config.cfg_parallel_size,
            # Ranks that split a sequence hold the parts of the weights; without them there are ranks for just that.
            hsdp=config.hsdp_shard_size if config.use_hsdp and sequence == 1 else 1,
            ring=config.ring_degree,
            ulysses=config.ulysses_degree,
            tp=config.tensor_parallel_size,
            vae=config.vae_parallel_size,
        )

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        return (self.cfg, self.hsdp, self.ring, self.ulysses, self.tp)

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return math.prod(self.mesh_shape)

    @property
    def num_ranks(self) -> int:
        """Ranks of all replicas."""
        return self.world_size * self.data

    @property
    def is_in_torchrun(self) -> bool:
        """Whether this process is one of the ranks, and not the one that starts them."""
        return self.num_ranks > 1 and envs.torchrun_ranks() is not None

    @property
    def sizes(self) -> dict[str, int]:
        """The options whose product is the number of all ranks."""
        return {
            "data_parallel_size": self.data,
            "cfg_parallel_size": self.cfg,
            "hsdp_shard_size": self.hsdp,
            "ring_degree": self.ring,
            "ulysses_degree": self.ulysses,
            "tensor_parallel_size": self.tp,
        }

    @property
    def product(self) -> str:
        """The sizes above 1, for messages."""
        return " x ".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "one rank"


def check_layout(od_config: OmniDiffusionConfig) -> ParallelLayout:
    """The layout that the configuration asks for, checked before any process starts.

    Raises ``InvalidConfigError`` for sizes that do not fit the model, each other or the machine, and
    ``FeatureNotAvailableError`` for a combination that cannot work.
    """
    config = od_config.parallel_config
    layout = ParallelLayout.from_config(config)
    _check_combination(od_config, layout)
    _check_launcher(od_config, layout)
    _check_heads(od_config, layout)
    _check_devices(od_config, layout)
    return layout


def _check_combination(od_config: OmniDiffusionConfig, layout: ParallelLayout) -> None:
    config = od_config.parallel_config
    sequence = layout.ring * layout.ulysses
    if config.pipeline_parallel_size > 1:
        raise FeatureNotAvailableError(
            f"pipeline_parallel_size={config.pipeline_parallel_size}: blocks are not spread over ranks, for a request"
            " would be no faster and its weights fit by other means; use tensor_parallel_size or ulysses_degree for"
            " speed, data_parallel_size for throughput, use_hsdp for memory (docs/features/parallel.md says why)"
        )
    if sequence > 1 and od_config.attention_dtype is not None:
        raise FeatureNotAvailableError(
            f"attention_dtype={od_config.attention_dtype!r} with ulysses_degree={layout.ulysses}, ring_degree="
            f"{layout.ring}: ranks that share a sequence exchange it in the model's dtype; leave attention_dtype out or"
            " use tensor_parallel_size or cfg_parallel_size"
        )
    if config.use_hsdp:
        if od_config.quantization is not None:
            raise FeatureNotAvailableError(
                f"use_hsdp=True with quantization={od_config.quantization!r}: the scales of a weight do not travel with"
                " its parts; use one of them"
            )
        if layout.tp > 1:
            raise FeatureNotAvailableError(
                f"use_hsdp=True with tensor_parallel_size={layout.tp}: both split the same weights; use one of them"
            )
        if sequence > 1 and config.hsdp_shard_size not in (1, sequence):
            raise InvalidConfigError(
                f"hsdp_shard_size={config.hsdp_shard_size} must equal ring_degree x ulysses_degree ="
                f" {config.ring_degree} x {config.ulysses_degree} = {sequence}, whose ranks hold the parts; or leave it"
                " out",
                option="hsdp_shard_size",
            )
        if sequence == 1 and config.hsdp_shard_size == 1:
            raise InvalidConfigError(
                "use_hsdp=True needs ranks to hold the parts of the weights: set hsdp_shard_size, or ulysses_degree or"
                " ring_degree, to 2 or more",
                option="use_hsdp",
            )
    elif config.hsdp_shard_size > 1:
        raise InvalidConfigError(
            f"hsdp_shard_size={config.hsdp_shard_size} goes with use_hsdp=True", option="hsdp_shard_size"
        )
    if layout.vae > 1:
        if not od_config.memory.vae_use_tiling:
            raise InvalidConfigError(
                f"vae_parallel_size={layout.vae} decodes the tiles of vae_use_tiling=True on different ranks; set it",
                option="vae_parallel_size",
            )
        if layout.vae > layout.world_size:
            raise InvalidConfigError(
                f"vae_parallel_size={layout.vae} must be at most {layout.world_size}, the number of ranks"
                f" ({layout.product})",
                option="vae_parallel_size",
            )


def _check_launcher(od_config: OmniDiffusionConfig, layout: ParallelLayout) -> None:
    """What starts the ranks: this engine, Ray or torchrun."""
    uses_ray = od_config.parallel_config.distributed_executor_backend == "ray"
    if uses_ray and od_config.torch_device.index:
        raise InvalidConfigError(
            f"device={od_config.device!r} with distributed_executor_backend='ray': Ray chooses the GPU of each rank;"
            " use device='cuda'",
            option="device",
        )
    if not layout.is_in_torchrun:
        return
    if uses_ray:
        raise InvalidConfigError(
            "distributed_executor_backend='ray': torchrun has started the ranks; leave it out, or start the script"
            " without torchrun",
            option="distributed_executor_backend",
        )
    if od_config.scheduling_policy not in (None, "fcfs"):
        raise InvalidConfigError(
            f"scheduling_policy={od_config.scheduling_policy!r} goes by times, which differ between the processes of"
            " torchrun; use 'fcfs'",
            option="scheduling_policy",
        )


def _check_heads(od_config: OmniDiffusionConfig, layout: ParallelLayout) -> None:
    """The model's layers check what they split themselves; its heads can be known before it is built."""
    if max(layout.tp, layout.ulysses) == 1:
        return
    num_heads = od_config.tf_model_config.get("num_attention_heads")
    if not isinstance(num_heads, int):
        return
    if num_heads % layout.tp:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise InvalidConfigError(
            f"tensor_parallel_size={layout.tp} does not divide num_attention_heads={num_heads} of the transformer;"
            f" these would: {divisors}",
            option="tensor_parallel_size",
        )
    if layout.ulysses > num_heads // layout.tp:
        raise InvalidConfigError(
            f"ulysses_degree={layout.ulysses} must be at most {num_heads // layout.tp}: num_attention_heads={num_heads}"
            f" over tensor_parallel_size={layout.tp}; use ring_degree for the rest",
            option="ulysses_degree",
        )


def _check_devices(od_config: OmniDiffusionConfig, layout: ParallelLayout) -> None:
    device = od_config.torch_device
    needed = layout.num_ranks
    if needed == 1 or od_config.parallel_config.distributed_executor_backend == "ray":
        return  # a cluster says itself whether it has room
    needed = envs.torchrun_ranks() or needed  # those of this machine
    if device.type == "cuda":
        usable = torch.cuda.device_count() - (device.index or 0)
        shortage = f"needs {needed} GPUs, this machine has {usable} from {device} on"
    else:
        num_cores = os.cpu_count() or 1
        usable = max(_LEAST_CPU_RANKS, _CPU_RANKS_PER_CORE * num_cores)
        shortage = f"makes {needed} ranks, and at most {usable} may share the {num_cores} cores of this CPU"
    if needed > usable:
        raise InvalidConfigError(
            f"{layout.product} {shortage}; lower a size so that the product is at most {usable}",
            option=max(layout.sizes, key=lambda name: layout.sizes[name]),
        )


def rank_config_device(device: torch.device, rank: int) -> str:
    """The device of a rank: GPUs are counted from the configured one, a CPU is shared."""
    return str(torch.device("cuda", (device.index or 0) + rank)) if device.type == "cuda" else str(device)
