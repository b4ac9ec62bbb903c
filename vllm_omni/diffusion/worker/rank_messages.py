"""What an engine and the process of a rank say to each other, beside commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.distributed.rank_status import Wait
from vllm_omni.diffusion.registry import RegistryEntry
from vllm_omni.diffusion.worker.messages import WorkerResult


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What a rank is told first. ``od_config`` names its device."""

    od_config: OmniDiffusionConfig
    rank: int
    layout: ParallelLayout
    store_host: str
    store_port: int
    num_threads: int
    registry_entry: RegistryEntry


@dataclass(frozen=True, kw_only=True)
class RankBeat:
    """Sent a few times per second: how long the rank has computed nothing, what it waits for, and if it is alone."""

    idle_s: float
    waiting_for: Wait | None
    is_alone: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Bytes of the weights that a rank has read."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class RankReady:
    """The model is loaded, or ``error`` says why it is not."""

    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class RankReply:
    """What became of the command ``number``. Ranks but the first leave out the outputs."""

    number: int
    result: WorkerResult | None
    error: BaseException | None = None  # of the rank, and not of a request
    finished: frozenset[str] = field(default_factory=frozenset)
    failed: frozenset[str] = field(default_factory=frozenset)
