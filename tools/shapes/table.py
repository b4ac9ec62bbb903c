"""Many scenes as tensors: sampled by several processes, drawn in batches on the device that trains.

Legend: N scenes, K captions per scene, L tokens, B pictures of one batch. Lengths are pixels.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from tools.shapes import scenes
from tools.shapes.tokenizer import SUFFIX, build_tokenizer

MAX_WORKERS = 8
CHUNK = 1000  # scenes of one task; a seed gives the same table whatever the number of processes
CAPTION_TOKENS = 32  # the longest caption has 29; attention is fastest on multiples of eight
_COLOURS = tuple(scenes.COLOURS)
NUM_LABELS = len(_COLOURS) + len(scenes.SHAPES)
_SIDES = range(scenes.SIZES["small"][0] - 4, scenes.SIZES["large"][1] + 5, 2)  # some more than scenes have


@dataclass(frozen=True)
class SceneTable:
    """N scenes. An absent object has side 0."""

    backgrounds: Tensor  # [N, 2] colour index at the top and at the bottom
    things: Tensor  # [N, 3, 5] colour index, shape index, left, top, side
    caption_ids: Tensor  # [N, K, L] token ids behind the fixed prefix, 0 after the end
    caption_lengths: Tensor  # [N, K]

    def to(self, device: torch.device) -> SceneTable:
        return SceneTable(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.backgrounds)


def sample_table(count: int, seed: int, num_captions: int = 0, num_workers: int | None = None) -> SceneTable:
    """`count` training scenes with `num_captions` true captions each."""
    return SceneTable(*sample_columns(_sample_chunk, count, seed, num_captions, num_workers=num_workers))


def thinned(table: SceneTable, keep_single: float) -> SceneTable:
    """The table with a share, 0..1, of its scenes of one object, the first ones: they are learnt long before others."""
    single = (table.things[:, :, 4] > 0).sum(1) == 1
    kept = ~single | (single.cumsum(0) <= keep_single * single.sum())
    return SceneTable(*(getattr(table, name)[kept] for name in table.__dataclass_fields__))


def sample_columns(
    sample_chunk: Callable[[tuple[Any, ...]], tuple[np.ndarray, ...]],
    count: int,
    seed: int,
    *options: Any,
    num_workers: int | None = None,
) -> list[Tensor]:
    """`count` rows by several processes: what `sample_chunk((rows, seed, *options))` gives for each chunk, joined."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    tasks = [(size, f"{seed}:{i}", *options) for i, size in enumerate(sizes)]
    workers = min(len(tasks), num_workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))))
    if workers == 1:
        parts = [sample_chunk(task) for task in tasks]
    else:
        with warnings.catch_warnings():
            # A fork spares each worker the import of torch. Python warns of the parent's threads; no worker needs them.
            warnings.simplefilter("ignore", DeprecationWarning)
            with get_context("fork").Pool(workers) as pool:
                parts = pool.map(sample_chunk, tasks, chunksize=1)
    return [torch.from_numpy(np.concatenate(columns)) for columns in zip(*parts, strict=True)]


def _sample_chunk(task: tuple[int, str, int]) -> tuple[np.ndarray, ...]:
    count, seed, num_captions = task
    rng = random.Random(seed)
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    backgrounds, things = tabulate(drawn)
    ids = np.zeros((count, num_captions, CAPTION_TOKENS), np.int16)
    lengths = np.zeros((count, num_captions), np.int16)
    for scene, row, row_lengths in zip(drawn, ids, lengths, strict=True):
        for k in range(num_captions):
            tail = caption_ids(scenes.caption(scene, rng))
            row[k, : len(tail)], row_lengths[k] = tail, len(tail)
    return backgrounds, things, ids, lengths


@cache
def _tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


@cache
def _piece_ids(piece: str) -> list[int]:
    return _tokenizer()(piece).input_ids


def caption_ids(text: str) -> list[int]:
    """Token ids that the tokenizer gives to a caption behind the prefix, the suffix included.

    Merges never cross the bounds of words, so each word is looked up alone: ten times as fast.
    """
    words = [token for word in re.findall(r" ?[a-z]+|,", text) for token in _piece_ids(word)]
    return words + _piece_ids(SUFFIX)


def tabulate(drawn: list[scenes.Scene]) -> tuple[np.ndarray, np.ndarray]:
    """The columns `backgrounds` and `things` of a table, int16."""
    backgrounds = [[_COLOURS.index(s.background[0]), _COLOURS.index(s.background[-1])] for s in drawn]
    things = np.zeros((len(drawn), 3, 5), np.int16)
    for row, scene in zip(things, drawn, strict=True):
        for cell, t in zip(row, scene.things, strict=False):
            left, top = round(t.x - t.side / 2), round(t.y - t.side / 2)
            cell[:] = _COLOURS.index(t.colour), scenes.SHAPES.index(t.shape), left, top, t.side
    return np.array(backgrounds, np.int16), things


@cache
def _palette_and_masks(device: torch.device) -> tuple[Tensor, Tensor]:
    """Colours [8, 3] in 0..255 and coverage [shapes x sides, S, S] in 0..1, zero beyond a mask's side."""
    palette = torch.tensor(list(scenes.COLOURS.values()), dtype=torch.float32, device=device)
    masks = np.zeros((len(scenes.SHAPES) * len(_SIDES), _SIDES[-1], _SIDES[-1]), np.float32)
    for i, shape in enumerate(scenes.SHAPES):
        for j, side in enumerate(_SIDES):
            masks[i * len(_SIDES) + j, :side, :side] = scenes.shape_mask(shape, side)
    return palette, torch.from_numpy(masks).to(device)


def draw(backgrounds: Tensor, things: Tensor, corners: Tensor | None = None, size: int = scenes.PICTURE_SIZE) -> Tensor:
    """Rows of a table to pictures [B, 3, size, size] in -1..1, as `scenes.render` draws them.

    `corners` [B, 2] is the left and top of a crop of `size`; absent: the whole picture.
    """
    device, count = backgrounds.device, len(backgrounds)
    palette, masks = _palette_and_masks(device)
    span = torch.arange(size, device=device)
    left, top = (0, 0) if corners is None else (corners[:, :1], corners[:, 1:])
    columns, rows = (span + left).expand(count, size), (span + top).expand(count, size)
    ends = palette[backgrounds.long()]
    t = (rows / (scenes.PICTURE_SIZE - 1))[:, :, None, None]
    canvas = (ends[:, None, None, 0] + (ends[:, None, None, 1] - ends[:, None, None, 0]) * t).repeat(1, 1, size, 1)
    for thing in things.long().unbind(1):
        colour, shape, x, y, side = thing[:, :, None].unbind(1)
        inside_x, inside_y = (columns >= x) & (columns < x + side), (rows >= y) & (rows < y + side)
        table = (shape * len(_SIDES) + (side - _SIDES[0]) // 2).clamp(min=0)
        across, down = (columns - x).clamp(0, _SIDES[-1] - 1), (rows - y).clamp(0, _SIDES[-1] - 1)
        cover = masks[table[:, :, None], down[:, :, None], across[:, None, :]]
        cover = (cover * (inside_y[:, :, None] & inside_x[:, None, :]))[..., None]
        canvas += cover * (palette[colour][:, :, None] - canvas)
    return ((canvas + 0.5).floor_() / 127.5 - 1).permute(0, 3, 1, 2)


def layout(things: Tensor, cells: int) -> Tensor:
    """What stands where, [B, 13, cells, cells]: the share of each cell within a box of each colour and shape.

    `things` [B, 3, 5] as in a table. A label of the whole box tells a corner cell which shape it belongs to.
    """
    side = scenes.PICTURE_SIZE / cells
    start = torch.arange(cells, device=things.device) * side
    across, down = (
        (torch.minimum(low + things[:, :, 4:], start + side) - torch.maximum(low, start)).clamp(min=0) / side
        for low in (things[:, :, 2:3], things[:, :, 3:4])
    )
    labels = torch.arange(NUM_LABELS, device=things.device)
    labels = (labels == things[:, :, :1]) | (labels == things[:, :, 1:2] + len(_COLOURS))
    return torch.einsum("bnk,bny,bnx->bkyx", labels.float(), down, across)
