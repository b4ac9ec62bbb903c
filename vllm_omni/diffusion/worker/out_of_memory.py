"""What to do about memory that ran out."""

from __future__ import annotations

import torch

from vllm_omni.errors import InsufficientMemoryError, first_line, release_frames


def explained(error: Exception) -> Exception:
    """Memory that ran out, as an error that says what to do; any other error as it is.

    Tensors of a forward that failed are let go: another try of a smaller one may need the memory.
    """
    release_frames(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        advised = InsufficientMemoryError(
            f"the device ran out of memory ({first_line(error)}); ask for a"
            " smaller size or fewer outputs, lower max_batch_size, or set vae_use_tiling=True"
        )
        advised.__cause__ = error
        return advised
    return error
