"""A product of few rows in FP8 (e4m3), whose sum over the input features is split among the multiprocessors.

One tile of a product for each multiprocessor needs more output features than few rows have: 128 rows of 3,072 output
features fill 24 of the 132 of an H100 with tiles of 128 x 128. Here each tile is computed in parts, and a second kernel
adds the parts in their order, so that equal inputs give equal outputs.

Shapes: R rows, I input features, O output features, P parts of the sum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_CHUNK = 128  # input features that are multiplied at once: 128 bytes
_MAX_ROWS = 256
_ADDED = 1024  # output features that a program adds up


class Tile(NamedTuple):
    """How a product is divided: the tile of one program, and the parts of its sum."""

    rows: int
    features: int
    parts: int
    warps: int = 4
    stages: int = 4


@triton.jit
def _scaled(sums, x_scale, weight_scale, bias, rows, features, num_rows, num_features, HAS_BIAS: tl.constexpr):
    inside = features < num_features
    sums *= tl.load(x_scale + rows, mask=rows < num_rows, other=0.0)[:, None]
    sums *= tl.load(weight_scale + features, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + features, mask=inside, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _multiply(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    out,
    num_rows,
    num_features,
    width: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    part = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    columns = part * (width // PARTS) + tl.arange(0, CHUNK)
    # What lies outside is read from the first row or feature, and not stored.
    x_rows = tl.where(rows < num_rows, rows, 0)
    weight_rows = tl.where(features < num_features, features, 0).to(tl.int64)
    values = x + x_rows[:, None] * width + columns[None, :]
    weights = weight + weight_rows[None, :] * width + columns[:, None]
    sums = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
    for _ in range(width // PARTS // CHUNK):
        sums = tl.dot(tl.load(values), tl.load(weights), sums)
        values += CHUNK
        weights += CHUNK
    if PARTS == 1:
        sums = _scaled(sums, x_scale, weight_scale, bias, rows, features, num_rows, num_features, HAS_BIAS)
    target = out + (part * num_rows + rows)[:, None] * num_features + features[None, :]
    mask = (rows < num_rows)[:, None] & (features < num_features)[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts(
    parts,
    x_scale,
    weight_scale,
    bias,
    out,
    num_rows,
    num_features,
    PARTS: tl.constexpr,
    FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) + tl.arange(0, 1)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask = (features < num_features)[None, :]
    places = rows[:, None] * num_features + features[None, :]
    sums = tl.zeros((1, FEATURES), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        sums += tl.load(parts + part * num_rows * num_features + places, mask=mask, other=0.0)
    sums = _scaled(sums, x_scale, weight_scale, bias, rows, features, num_rows, num_features, HAS_BIAS)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=mask)


def split_sum_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
) -> None:
    """``out = x weight^T * x_scale * weight_scale + bias``.

    ``x [R, I], weight [O, I] in FP8, x_scale [R, 1], weight_scale [1, O] in float32, bias [O], out [R, O]``, all
    contiguous. The parts of ``tile`` must divide I into multiples of 128.
    """
    num_rows, width = x.shape
    num_features = weight.shape[0]
    scales = x_scale, weight_scale, out if bias is None else bias
    shared = {"PARTS": tile.parts, "HAS_BIAS": bias is not None}
    parts = out if tile.parts == 1 else x.new_empty((tile.parts, num_rows, num_features), dtype=torch.float32)
    _multiply[(triton.cdiv(num_rows, tile.rows), triton.cdiv(num_features, tile.features), tile.parts)](
        x,
        scales[0],
        weight,
        *scales[1:],
        parts,
        num_rows,
        num_features,
        width=width,
        ROWS=tile.rows,
        FEATURES=tile.features,
        CHUNK=_CHUNK,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **shared,
    )
    if tile.parts > 1:
        grid = num_rows, triton.cdiv(num_features, _ADDED)
        _add_parts[grid](parts, *scales, out, num_rows, num_features, FEATURES=_ADDED, num_warps=4, **shared)


def choose_tile(num_rows: int, num_features: int, width: int, device: torch.device) -> Tile | None:
    """The tile for a product, or None where cuBLAS is to compute it: wide outputs give it work for all it has.

    From a sweep over tiles on an H100 (128 rows, microseconds, cuBLAS before): 12288 to 3072 features 32.2 and 22.3,
    3072 to 3072 11.6 and 8.4; to 9216 and 12288 features none was faster.
    """
    if num_rows > _MAX_ROWS or num_features > 4096 or width % _CHUNK or not _is_hopper(device):
        return None
    rows = 64 if num_rows <= 64 else 128
    if width < 8192:
        return Tile(rows, 32, 1)
    parts = 2 if width // _CHUNK % 2 == 0 else 1
    return Tile(rows, 64, parts) if num_rows <= 128 else Tile(rows, 128, parts, warps=8)


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Where the tiles were measured; others may have less shared memory."""
    return torch.cuda.get_device_capability(device) == (9, 0)
