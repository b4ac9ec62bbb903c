"""Tensors of several requests, as one.

Shapes: n_i rows of part i, L_i its length, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad_sequences(parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``[n_i, L_i, D] -> [n_i, max L, D]`` each, and the mask ``[sum n_i, max L]``; no mask if nothing is padded."""
    lengths = [part.shape[1] for part in parts]
    longest = max(lengths)
    if min(lengths) == longest:
        return parts, None
    mask = parts[0].new_zeros((sum(part.shape[0] for part in parts), longest), dtype=torch.bool)
    padded, row = [], 0
    for part in parts:
        mask[row : row + part.shape[0], : part.shape[1]] = True
        row += part.shape[0]
        padded.append(torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])))
    return padded, mask


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[n_i, ...] each -> [sum n_i, ...]``; a single part is returned as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
