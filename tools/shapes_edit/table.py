"""Many examples as tensors: sampled by several processes; `tools.shapes.table.draw` draws both of their pictures.

Legend: N examples, L tokens. Lengths are pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from tools.shapes.table import sample_columns, tabulate
from tools.shapes.tokenizer import SUFFIX
from tools.shapes_edit.edits import sample_example
from tools.shapes_edit.tokenizer import AFTER_PICTURE, build_tokenizer

INSTRUCTION_TOKENS = 18  # the longest has 14; with what stands before, the sequence is a multiple of eight


@dataclass(frozen=True)
class ExampleTable:
    """N examples. An absent object has side 0."""

    backgrounds: Tensor  # [N, 2] colour index at the top and at the bottom
    source: Tensor  # [N, 3, 5] colour index, shape index, left, top, side
    target: Tensor  # [N, 3, 5]
    ids: Tensor  # [N, L] token ids behind the picture, 0 after the end
    lengths: Tensor  # [N]

    def to(self, device: torch.device) -> ExampleTable:
        return ExampleTable(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.backgrounds)


def sample_table(count: int, seed: int, num_workers: int | None = None) -> ExampleTable:
    """`count` training examples."""
    return ExampleTable(*sample_columns(_sample_chunk, count, seed, num_workers=num_workers))


def _sample_chunk(task: tuple[int, str]) -> tuple[np.ndarray, ...]:
    count, seed = task
    rng = random.Random(seed)
    drawn = [sample_example(rng) for _ in range(count)]
    backgrounds, source = tabulate([e.source for e in drawn])
    _, target = tabulate([e.target for e in drawn])
    ids = np.zeros((count, INSTRUCTION_TOKENS), np.int16)
    lengths = np.zeros(count, np.int16)
    for i, row in enumerate(build_tokenizer()([AFTER_PICTURE + e.text + SUFFIX for e in drawn]).input_ids):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return backgrounds, source, target, ids, lengths
