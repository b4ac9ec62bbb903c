"""Norms of pictures whose channels lie together (channels-last) with SiLU after them, and what is between.

torch's group norm of a GPU turns its input into channels-first memory, and the convolution after it turns that back.

Shapes: N pictures, C channels, ``...`` frames, H height, W width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_VALUES = 16384  # of a program
_CHUNKS = 1024  # that are summed at once


@triton.jit
def _chunk_moments(x, moments, num_pixels, num_channels: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    chunk, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels = chunk * PIXELS + tl.arange(0, PIXELS)[:, None].to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    mask = (pixels < num_pixels) & (channels[None, :] < num_channels)
    values = tl.load(x + (picture * num_pixels + pixels) * num_channels + channels[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    count = tl.minimum(num_pixels - chunk * PIXELS, PIXELS).to(tl.float32)
    mean = tl.sum(values, axis=0) / count
    centred = tl.where(mask, values - mean[None, :], 0.0)
    squares = tl.sum(centred * centred, axis=0)
    # Squares about the chunk's own mean: those about zero would lose what differs from a large mean.
    place = moments + (picture * tl.num_programs(0) + chunk) * 2 * num_channels + channels
    tl.store(place, mean, mask=channels < num_channels)
    tl.store(place + num_channels, squares, mask=channels < num_channels)


@triton.jit
def _group_factors(
    moments,
    weight,
    bias,
    shift,
    factors,
    num_pixels,
    num_chunks,
    eps,
    num_channels: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inside = tl.arange(0, SIZE) < WIDTH
    channels = group * WIDTH + tl.arange(0, SIZE)
    start = moments + picture * num_chunks * 2 * num_channels
    shifts = tl.zeros((SIZE,), dtype=tl.float32)
    if HAS_SHIFT:
        shifts += tl.load(shift + channels, mask=inside, other=0.0).to(tl.float32)
    size = num_pixels * 1.0 * WIDTH
    totals = tl.zeros((CHUNKS, SIZE), dtype=tl.float32)
    first = 0
    while first < num_chunks:
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < num_chunks) & inside[None, :]
        counts = tl.minimum(num_pixels - chunks * PIXELS, PIXELS).to(tl.float32)
        means = tl.load(start + chunks * 2 * num_channels + channels[None, :], mask=mask, other=0.0)
        totals += tl.where(mask, (means + shifts[None, :]) * counts, 0.0)
        first += CHUNKS
    mean = tl.sum(tl.sum(totals, axis=1), axis=0) / size
    totals = tl.zeros((CHUNKS, SIZE), dtype=tl.float32)
    first = 0
    while first < num_chunks:
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < num_chunks) & inside[None, :]
        counts = tl.minimum(num_pixels - chunks * PIXELS, PIXELS).to(tl.float32)
        place = start + chunks * 2 * num_channels + channels[None, :]
        difference = tl.load(place, mask=mask, other=0.0) + shifts[None, :] - mean
        squares = tl.load(place + num_channels, mask=mask, other=0.0)
        totals += tl.where(mask, squares + difference * difference * counts, 0.0)
        first += CHUNKS
    inverse = tl.rsqrt(tl.sum(tl.sum(totals, axis=1), axis=0) / size + eps)
    factor = inverse * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32) + (shifts - mean) * factor
    place = factors + picture * 2 * num_channels + channels
    tl.store(place, factor, mask=inside)
    tl.store(place + num_channels, offset, mask=inside)


@triton.jit
def _scale_and_shift(
    x,
    factors,
    out,
    num_pixels,
    num_channels: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
):
    chunk, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels = chunk * PIXELS + tl.arange(0, PIXELS)[:, None].to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    within = channels < num_channels
    mask = (pixels < num_pixels) & within[None, :]
    place = (picture * num_pixels + pixels) * num_channels + channels[None, :]
    factor = tl.load(factors + picture * 2 * num_channels + channels, mask=within, other=0.0)
    offset = tl.load(factors + picture * 2 * num_channels + num_channels + channels, mask=within, other=0.0)
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _channel_rms_norm(
    x,
    weight,
    bias,
    out,
    num_pixels,
    scale,
    num_channels: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    pixels = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channels = tl.arange(0, CHANNELS)
    within = channels < num_channels
    mask = (pixels < num_pixels) & within[None, :]
    place = pixels * num_channels + channels[None, :]
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    squared = tl.maximum(tl.sum(values * values, axis=1), 1e-24)
    factor = tl.load(weight + channels, mask=within, other=0.0).to(tl.float32) * scale
    values = values * tl.rsqrt(squared)[:, None] * factor[None, :]
    if HAS_BIAS:
        values += tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_to(x, residual, bias, num_pixels, num_channels: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    pixels = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channels = tl.arange(0, CHANNELS)
    within = channels < num_channels
    mask = (pixels < num_pixels) & within[None, :]
    place = pixels * num_channels + channels[None, :]
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(x + place, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _double_sides(x, out, width, num_channels: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # of all pictures, so that its two rows of the output are 2 * row and the next
    columns = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channels = tl.arange(0, CHANNELS)[None, :]
    mask = (columns < width) & (channels < num_channels)
    values = tl.load(x + (row * width + columns) * num_channels + channels, mask=mask, other=0.0)
    for part in tl.static_range(4):
        place = (2 * row + part // 2) * 2 * width + 2 * columns + part % 2
        tl.store(out + place * num_channels + channels, values, mask=mask)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x [N, C, ...]``, normalised by group of channels, then its SiLU if asked for; both channels-last.

    ``shift [C]`` is added to x first, as the bias of the convolution before.
    """
    pictures, channels = x.shape[:2]
    num_pixels = x[0, 0].numel()
    sizes = _sizes(channels)
    num_chunks = triton.cdiv(num_pixels, sizes["PIXELS"])
    moments = x.new_empty((pictures, num_chunks, 2, channels), dtype=torch.float32)
    factors = x.new_empty((pictures, 2, channels), dtype=torch.float32)
    out = torch.empty_like(x)
    width = channels // num_groups
    grid = (num_chunks, pictures)
    _chunk_moments[grid](x, moments, num_pixels, num_channels=channels, **sizes, num_warps=8)
    _group_factors[(num_groups, pictures)](
        moments,
        weight,
        bias,
        weight if shift is None else shift,
        factors,
        num_pixels,
        num_chunks,
        eps,
        num_channels=channels,
        WIDTH=width,
        SIZE=triton.next_power_of_2(width),
        PIXELS=sizes["PIXELS"],
        CHUNKS=_CHUNKS,
        HAS_SHIFT=shift is not None,
        num_warps=8,
    )
    _scale_and_shift[grid](x, factors, out, num_pixels, num_channels=channels, **sizes, SILU=silu, num_warps=8)
    return out


def channel_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, silu: bool
) -> torch.Tensor:
    """``x [N, C, ...]``, each pixel over the norm of its channels, times ``scale * weight``; both channels-last."""
    channels = x.shape[1]
    num_pixels = x.numel() // channels
    sizes = _sizes(channels)
    out = torch.empty_like(x)
    _channel_rms_norm[(triton.cdiv(num_pixels, sizes["PIXELS"]),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_pixels,
        scale,
        num_channels=channels,
        **sizes,
        HAS_BIAS=bias is not None,
        SILU=silu,
        num_warps=8,
    )
    return out


def add_to(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x [N, C, ...] + residual [N, C, ...] + bias [C]`` in the memory of x; all channels-last."""
    channels = x.shape[1]
    num_pixels = x.numel() // channels
    sizes = _sizes(channels)
    grid = (triton.cdiv(num_pixels, sizes["PIXELS"]),)
    _add_to[grid](x, residual, bias, num_pixels, num_channels=channels, **sizes, num_warps=8)
    return x


def double_sides(x: torch.Tensor) -> torch.Tensor:
    """``x [N, C, H, W] -> [N, C, 2 H, 2 W]``, each pixel four times; both channels-last."""
    pictures, channels, height, width = x.shape
    out = x.new_empty((pictures, 2 * height, 2 * width, channels)).permute(0, 3, 1, 2)
    sizes = _sizes(channels, 4096)
    grid = (pictures * height, triton.cdiv(width, sizes["PIXELS"]))
    _double_sides[grid](x, out, width, num_channels=channels, **sizes, num_warps=4)
    return out


def _sizes(channels: int, values: int | None = None) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"PIXELS": max((_VALUES if values is None else values) // block, 1), "CHANNELS": block}
