"""CUDA graphs of the blocks of a transformer: the host starts hundreds of kernels with one call.

A graph repeats what was captured, on the same memory: it has inputs of its own, into which those of each call are
copied, and is made for one set of shapes. Shapes are run twice before they are captured, for the first time compiles
and the second may.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vllm_omni.diffusion.compile import repeated_blocks
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.peer_memory import exchange_sequence
from vllm_omni.diffusion.distributed.sequence_parallel import current_sharded_forward
from vllm_omni.diffusion.staged_forward import RowInputs, StagedForward, Streams
from vllm_omni.errors import first_line
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_RUNS_BEFORE_CAPTURE = 2
# Each keeps its inputs and outputs, some 50 MB for a large picture; all share the memory in between.
_MAX_GRAPHS = 16

_Tensors = tuple[torch.Tensor | None, ...]


@dataclass
class _Shapes:
    """What became of one set of shapes."""

    num_runs: int = 0
    inputs: tuple[_Tensors, _Tensors, _Tensors] | None = None  # streams, row inputs, shared inputs
    outputs: Streams = ()
    graph: torch.cuda.CUDAGraph | None = None


class GraphedBlocks:
    """Runs blocks as CUDA graphs. Its graphs share one pool of memory, for no two of them run at once."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[Hashable, _Shapes] = OrderedDict()
        self._pool: Any = None
        self._failure: str | None = None
        self._was_replayed = False

    def describe(self) -> tuple[str, ...]:
        """What really runs, for the receipt; nothing if no graph ran."""
        if self._failure is not None:
            return (f"CUDA graphs failed: {self._failure}",)
        return ("CUDA graphs",) if self._was_replayed else ()

    def run(self, stages: StagedForward, streams: Streams, row_inputs: RowInputs, start: int, stop: int) -> Streams:
        """The streams before block ``stop``, from those before block ``start``."""
        plain = replace(stages, runner=None)
        given = (streams, row_inputs, stages.shared_inputs)
        if self._failure is not None:
            return _in_sequence(plain, streams, row_inputs, start, stop)
        sharded = current_sharded_forward()
        # Two sequences may leave this rank as many tokens, and another rank not.
        total = None if sharded is None else sharded.total
        # Two transformers of one pipeline, such as experts for different steps, have the same shapes and other weights.
        owner = id(stages.spans[0].blocks[0])
        shapes = self._shapes((owner, start, stop, total, *(_signature(tensors) for tensors in given)))
        shapes.num_runs += 1
        if shapes.num_runs == 1:
            return _in_sequence(plain, streams, row_inputs, start, stop)
        if shapes.inputs is None:
            shapes.inputs = (_copies(streams), _copies(row_inputs), _copies(stages.shared_inputs))
        else:
            for kept, new in zip(shapes.inputs, given, strict=True):
                _copy(kept, new)
        if shapes.graph is None:
            own_streams, own_row_inputs, own_shared = shapes.inputs
            own = replace(plain, shared_inputs=own_shared)

            def run() -> Streams:
                return _in_sequence(own, own_streams, own_row_inputs, start, stop)  # type: ignore[arg-type]

            if shapes.num_runs <= _RUNS_BEFORE_CAPTURE:
                return run()
            try:
                self._capture(shapes, run)
            except RuntimeError as error:
                self._failure = first_line(error)
                self._by_key.clear()
                logger.warning("CUDA graphs failed, kernels are started one by one: %s", error)
                return _in_sequence(plain, streams, row_inputs, start, stop)
        assert shapes.graph is not None, "it was captured"
        shapes.graph.replay()
        self._was_replayed = True
        # The next replay writes over its outputs, and step caches keep some.
        return tuple(output.clone() for output in shapes.outputs)

    def _capture(self, shapes: _Shapes, run: Callable[[], Streams]) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Only this thread is kept from calls that a capture does not allow.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            shapes.outputs = run()
        shapes.graph = graph

    def _shapes(self, key: Hashable) -> _Shapes:
        shapes = self._by_key.setdefault(key, _Shapes())
        self._by_key.move_to_end(key)
        if len(self._by_key) > _MAX_GRAPHS:
            self._by_key.popitem(last=False)
        return shapes


def apply_cuda_graphs(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> GraphedBlocks | None:
    """Let the blocks of a pipeline's transformers run as CUDA graphs, if it is compiled and on a GPU.

    What ranks exchange within a block is part of the graph. What FSDP does is not: it works from the host.
    """
    if od_config.enforce_eager or od_config.torch_device.type != "cuda" or od_config.parallel_config.use_hsdp:
        return None
    blocks = GraphedBlocks()
    for transformer, _ in repeated_blocks(pipeline):
        stages = getattr(transformer, "stages", None)
        if stages is not None:
            transformer.stages = _graphed(stages, blocks)
    return blocks


def _in_sequence(stages: StagedForward, streams: Streams, row_inputs: RowInputs, start: int, stop: int) -> Streams:
    """Run the blocks. Captured or not, ranks exchange alike: one may have a graph where another one failed to."""
    with exchange_sequence():
        return stages.run_blocks(streams, row_inputs, start, stop)


def _graphed(stages: Callable[..., StagedForward], blocks: GraphedBlocks) -> Any:
    def graphed_stages(*args: Any, **kwargs: Any) -> StagedForward:
        return replace(stages(*args, **kwargs), runner=blocks.run)

    return graphed_stages


def _signature(tensors: _Tensors) -> tuple[Any, ...]:
    return tuple(None if x is None else (x.shape, x.dtype) for x in tensors)


def _copies(tensors: _Tensors) -> _Tensors:
    return tuple(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _copy(kept: _Tensors, new: _Tensors) -> None:
    for target, source in zip(kept, new, strict=True):
        if target is not None:
            assert source is not None, "both have the same signature"
            target.copy_(source)
