"""A linear layer of few rows whose weight is in FP8 (e4m3): bound by reading the weight, which is half as much.

Up to 4 rows are multiplied by sums in registers, more by tensor cores; both in the dtype of the input, to which the
weight is converted on its way.

Shapes: R rows, I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.operators import operator

_MAX_ROWS = 4  # each keeps its sums in registers
_MAX_TILED_ROWS = 256
# What a program multiplies at once, a chunk of input features at a time.
_IN_REGISTERS = {"FEATURES": 8, "CHUNK": 512, "num_warps": 4}
# From a sweep on an H100, 3072 to 18432 features: 49 us for 50 rows, 89 for 100, where reading the weight takes 19, and
# a weight that was turned to bf16 before took 245. 28 rows take 38 us with half as many rows, and as one tile serves
# all, the kernel is compiled once.
_TILED = {"ROWS": 64, "FEATURES": 64, "CHUNK": 128, "num_warps": 4, "num_stages": 4}


@triton.jit
def _few_rows_linear(
    x,
    weight,
    scales,
    bias,
    out,
    num_rows,
    width: tl.constexpr,
    num_features: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    sums = tl.zeros((ROWS, FEATURES, CHUNK), dtype=tl.float32)
    for start in tl.static_range(0, width, CHUNK):
        inside = start + columns < width
        weights = tl.load(
            weight + features[:, None] * width + start + columns[None, :],
            mask=(features < num_features)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        values = tl.load(
            x + rows[:, None] * width + start + columns[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        sums += weights[None, :, :] * values[:, None, :]
    output = tl.sum(sums, axis=2) * tl.load(scales + features, mask=features < num_features, other=0.0)[None, :]
    if HAS_BIAS:
        output += tl.load(bias + features, mask=features < num_features, other=0.0).to(tl.float32)[None, :]
    mask = (rows < num_rows)[:, None] & (features < num_features)[None, :]
    tl.store(out + rows[:, None] * num_features + features[None, :], output.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _more_rows_linear(
    x,
    weight,
    scales,
    bias,
    out,
    num_rows,
    width: tl.constexpr,
    num_features: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    # What lies outside is read from the first row or feature, and not stored.
    weights = weight + tl.where(features < num_features, features, 0).to(tl.int64)[:, None] * width + columns[None, :]
    values = x + tl.where(rows < num_rows, rows, 0)[None, :] * width + columns[:, None]
    sums = tl.zeros((FEATURES, ROWS), dtype=tl.float32)
    for start in range(0, width, CHUNK):
        inside = start + columns < width
        # The weight comes first in the product: there it may stay in the registers in which it is converted.
        left = tl.load(weights + start, mask=inside[None, :], other=0.0).to(x.dtype.element_ty)
        sums = tl.dot(left, tl.load(values + start, mask=inside[:, None], other=0.0), sums)
    sums *= tl.load(scales + features, mask=features < num_features, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + features, mask=features < num_features, other=0.0).to(tl.float32)[:, None]
    mask = (rows < num_rows)[None, :] & (features < num_features)[:, None]
    tl.store(out + rows[None, :] * num_features + features[:, None], sums.to(out.dtype.element_ty), mask=mask)


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x [R, I], weight [O, I] in FP8, scales [1, O] in float32, bias [O] -> [R, O]`` in the dtype of x."""
    x = x.contiguous()
    num_features, width = weight.shape
    if x.shape[0] > _MAX_TILED_ROWS:  # a product of many rows pays for a weight in the dtype of x
        scaled = F.linear(x, weight.to(x.dtype)).float() * scales
        return (scaled if bias is None else scaled + bias).to(x.dtype)
    num_rows, output = x.shape[0], x.new_empty(x.shape[0], num_features)
    kernel, sizes = _more_rows_linear, _TILED
    if num_rows <= _MAX_ROWS:
        kernel, sizes = _few_rows_linear, {**_IN_REGISTERS, "ROWS": triton.next_power_of_2(num_rows)}
    kernel[(triton.cdiv(num_features, sizes["FEATURES"]), triton.cdiv(num_rows, sizes["ROWS"]))](
        x,
        weight,
        scales,
        x if bias is None else bias,
        output,
        num_rows,
        width=width,
        num_features=num_features,
        HAS_BIAS=bias is not None,
        **sizes,
    )
    return output


few_rows_linear_op = operator(few_rows_linear, lambda x, weight, scales, bias: x.new_empty(x.shape[0], weight.shape[0]))
