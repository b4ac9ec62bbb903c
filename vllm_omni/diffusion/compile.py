"""Regional ``torch.compile``: the repeated blocks of a transformer, each class compiled once for all of its instances.

A transformer names the classes in ``_repeated_blocks``. Compiling them instead of the whole costs seconds instead of
minutes, and as nearly all of the time is spent in them, it gains the same. Sizes are symbols of the compiled code, so
that pictures of another size or texts of another length run the code that is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.rank_status import waiting_for
from vllm_omni.errors import FeatureNotAvailableError, first_line
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

# Sums over ranks are waited for where they are needed: one stream of tokens computes while another is summed.
_LATE_WAITS = {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": ["sink_waits"]}

_compiling = contextlib.ExitStack()


class CompiledBlocks:
    """What became of the compilation of a pipeline's blocks. It starts with the first call of a block."""

    def __init__(self) -> None:
        self.failure: str | None = None  # why nothing is compiled any more
        self.limit_was_hit = False

    def describe(self) -> str:
        """What really runs, for the receipt."""
        if self.failure is not None:
            return f"torch.compile failed, eager: {self.failure}"
        if self.limit_was_hit:
            return "torch.compile, eager for some shapes: limit of recompilations reached"
        return "torch.compile"


def check_compile(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> None:
    """Raises ``FeatureNotAvailableError`` if the configuration asks to compile a pipeline that names no blocks."""
    if od_config.enforce_eager:
        return
    transformers = list(repeated_blocks(pipeline))
    if not transformers:
        raise FeatureNotAvailableError(
            f"enforce_eager=False: no transformer of {type(pipeline).__name__} names its blocks in _repeated_blocks, so"
            " there is nothing to compile; leave the option out"
        )
    for transformer, names in transformers:
        missing = names - {type(block).__name__ for block in transformer.modules()}
        if missing:
            raise FeatureNotAvailableError(
                f"enforce_eager=False: {type(transformer).__name__}._repeated_blocks names"
                f" {', '.join(sorted(missing))}, which it has no module of; correct the name, or leave the option out"
            )


def apply_compile(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> CompiledBlocks | None:
    """Compile the repeated blocks in place, or return None if the configuration asks for eager execution."""
    check_compile(pipeline, od_config)
    if od_config.enforce_eager:
        return None
    if od_config.start.compile_cache_dir is not None:
        # torch has no other way to say it. It reads the variables when it compiles.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = od_config.start.compile_cache_dir
        os.environ["TRITON_CACHE_DIR"] = str(Path(od_config.start.compile_cache_dir) / "triton")
    _note_compilers()
    blocks = CompiledBlocks()
    for transformer, names in repeated_blocks(pipeline):
        for block in transformer.modules():
            if type(block).__name__ in names:
                # The method itself, not block.compile(): then each class has recompilations of its own to count, and
                # hooks of the block run as they are.
                # Weights that FSDP puts in place are arguments of the code: their sizes must not become symbols.
                dynamic = None if od_config.parallel_config.use_hsdp else True
                options = _LATE_WAITS if od_config.parallel_config.tensor_parallel_size > 1 else None
                block.forward = _compiled(block.forward, blocks, dynamic, options)
    return blocks


def _note_compilers() -> None:
    """Have this rank tell, whenever it compiles, that compilers work for it. Resetting the compiler ends that."""
    if _compilation_begins not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_compilation_begins)
        callback_handler.register_end_callback(_compilation_ends)


def _compilation_begins(_about: object) -> None:
    _compiling.enter_context(waiting_for("compiler"))


def _compilation_ends(_about: object) -> None:
    _compiling.close()


def repeated_blocks(pipeline: nn.Module) -> Iterator[tuple[nn.Module, set[str]]]:
    """The modules that declare repeated blocks, and the names of their classes."""
    for module in pipeline.modules():
        names = set(getattr(type(module), "_repeated_blocks", ()))
        if names:
            yield module, names


def _compiled(
    forward: Callable[..., Any], blocks: CompiledBlocks, dynamic: bool | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """``forward``, compiled; as it is written where that cannot be, which ``blocks`` then tells."""
    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic, options=options)

    def compiled_or_eager(*args: Any, **kwargs: Any) -> Any:
        if blocks.failure is not None:
            return forward(*args, **kwargs)
        try:
            with waiting_for("compiled"):
                return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:
            # The code that exists stays of use for the shapes that it was made for.
            blocks.limit_was_hit = True
            logger.warning("torch.compile: limit of recompilations reached", extra={"once": True})
        except TorchDynamoException as error:
            # Inputs that the code cannot take fail here again, with the error that says why, and prove nothing.
            output = forward(*args, **kwargs)
            blocks.failure = first_line(error)
            logger.warning("torch.compile failed, the transformer runs eagerly: %s", error)
            return output
        return forward(*args, **kwargs)

    return compiled_or_eager
