"""What to do about memory that ran out."""

from __future__ import annotations

import traceback

import torch

from vllm_omni.errors import InsufficientMemoryError, first_line


def explained(error: Exception) -> Exception:
    """Memory that ran out, as an error that says what to do; any other error as it is.

    What the frames of its traceback hold is let go: tensors of a forward that failed, for which another try of a
    smaller one may need the memory. The lines remain.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        advised = InsufficientMemoryError(
            f"the device ran out of memory ({first_line(error)}); ask for a"
            " smaller size or fewer outputs, lower max_batch_size, or set vae_use_tiling=True"
        )
        advised.__cause__ = error
        return advised
    return error
