"""A linear layer of few rows whose weight is in FP8 (e4m3): bound by reading the weight, which is half as much.

Shapes: R rows, I input features, O output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_omni.diffusion.layers.operators import operator

_ROWS = 16  # of a program: the least that a tensor core multiplies
_FEATURES = 32  # output features of a program
_CHUNK = 256  # input features that it multiplies at once
_NUM_STAGES = 3  # chunks that are in memory or on their way there


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
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    sums = tl.zeros((FEATURES, ROWS), dtype=tl.float32)
    weights_at = weight + features[:, None] * width + columns[None, :]
    values_at = x + rows[:, None] * width + columns[None, :]
    is_feature, is_row = (features < num_features)[:, None], (rows < num_rows)[:, None]
    for start in range(0, width, CHUNK):
        if width % CHUNK == 0:
            weights = tl.load(weights_at + start, mask=is_feature, other=0.0)
            values = tl.load(values_at + start, mask=is_row, other=0.0)
        else:
            inside = (start + columns < width)[None, :]
            weights = tl.load(weights_at + start, mask=is_feature & inside, other=0.0)
            values = tl.load(values_at + start, mask=is_row & inside, other=0.0)
        sums = tl.dot(weights.to(x.dtype.element_ty), tl.trans(values), sums)
    is_feature = features < num_features
    output = sums * tl.load(scales + features, mask=is_feature, other=0.0)[:, None]
    if HAS_BIAS:
        output += tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[:, None]
    place = rows[None, :] * num_features + features[:, None]
    tl.store(out + place, output.to(out.dtype.element_ty), mask=is_feature[:, None] & (rows < num_rows)[None, :])


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x [R, I], weight [O, I] in FP8, scales [1, O] in float32, bias [O] -> [R, O]`` in the dtype of x."""
    x = x.contiguous()
    num_features, width = weight.shape
    output = x.new_empty(x.shape[0], num_features)
    _few_rows_linear[(triton.cdiv(num_features, _FEATURES), triton.cdiv(x.shape[0], _ROWS))](
        x,
        weight,
        scales,
        x if bias is None else bias,
        output,
        x.shape[0],
        width=width,
        num_features=num_features,
        ROWS=_ROWS,
        FEATURES=_FEATURES,
        CHUNK=_CHUNK,
        HAS_BIAS=bias is not None,
        num_warps=4,
        num_stages=_NUM_STAGES,
    )
    return output


few_rows_linear_op = operator(few_rows_linear, lambda x, weight, scales, bias: x.new_empty(x.shape[0], weight.shape[0]))
