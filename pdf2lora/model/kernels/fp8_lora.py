"""LoRA inside the products of fp8.

Both sides of a frozen product get more columns: x W^T + L B^T is one product, [x L] [W B]^T, where L = x A^T. Without
them, a second product reads and writes y. The gradient of x gets A in the same way.

An e4m3 number has 4 significant bits. So each number of L and B is the sum of a high and a low one: 8 bits, as many as
bfloat16 has. Three blocks of columns give all products but low times low: [high low high] and [high high low].

The scale of a row was set by x or W. In addition, each column of L is divided by a step, and the column of B is
multiplied by it. The step is SPREAD * norm(row of A). A row's numbers then fit into e4m3 if norm(x) <= 64 max|x|, since
|L| <= norm(x) norm(row of A). This is always true up to 4,096 features. For 16,384 features it is true if the root mean
square of x is at most half of max|x|. If B needs a larger scale than a row of W has, the row gets the larger one: the
numbers of e4m3 keep their relative precision.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import Rows

BLOCKS = tl.constexpr(3)  # of columns, each with all ranks
SPREAD = tl.constexpr(32.0)
ALIGNMENT = 128  # bytes, of rows
BLOCK_ROWS, BLOCK_COLUMNS = 64, 16


class LoraColumns(NamedTuple):
    """The matrix whose columns are appended to frozen weights.

    matrix: (rows of the weights, ranks), B or A^T; norms: (ranks,), float32, of the rows of the other matrix.
    """

    matrix: Tensor
    norms: Tensor


@triton.jit
def _column(first, ranks, BLOCK_COLUMNS: tl.constexpr):
    """BLOCK_COLUMNS columns: their number, their rank and the block of ranks that they belong to."""
    column = first + tl.arange(0, BLOCK_COLUMNS)
    return column, column % ranks, column // ranks


@triton.jit
def _step(norms, rank):
    return tl.maximum(tl.load(norms + rank) * SPREAD, 1e-12)[None, :]


@triton.jit
def _high_or_low(values, block, LOW_BLOCK: tl.constexpr):
    """The high numbers of `values`, float32; the low ones in LOW_BLOCK; zero after BLOCKS.

    Numbers that are too large become the largest one of e4m3.
    """
    # Rounds to 3 bits of mantissa. Triton 3.6 converted numbers of e4m3 back to wrong numbers of float32 here.
    bits = tl.clamp(values, -448.0, 448.0).to(tl.int32, bitcast=True)
    high = ((bits + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    low = tl.clamp(values - high, -448.0, 448.0)
    chosen = tl.where((block == LOW_BLOCK)[None, :], low, high)
    return tl.where((block < BLOCKS)[None, :], chosen, 0.0)


@triton.jit
def _append(
    low_rank, norms, fp8, scale, tokens, ranks, num_columns, first_column, fp8_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column, rank, block = _column(tl.program_id(1) * BLOCK_COLUMNS, ranks, BLOCK_COLUMNS)
    row, exists = token.to(tl.int64)[:, None], (token < tokens)[:, None]
    values = tl.load(low_rank + row * ranks + rank[None, :], mask=exists, other=0.0).to(tl.float32)
    values /= tl.load(scale + token, mask=token < tokens, other=1.0)[:, None] * _step(norms, rank)
    to = fp8 + row * fp8_stride + first_column + column[None, :]
    result = _high_or_low(values, block, LOW_BLOCK=1)
    tl.store(to, result.to(fp8.dtype.element_ty), mask=exists & (column < num_columns)[None, :])


@triton.jit
def _append_to_weights(
    matrix, norms, fp8, scale, larger_scale, rows, ranks, row_stride, rank_stride, num_columns, first_column,
    fp8_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at, exists = row.to(tl.int64)[:, None], (row < rows)[:, None]
    row_scale = tl.load(scale + row, mask=row < rows, other=1.0)
    for first in range(0, ranks, BLOCK_COLUMNS):
        _, rank, _ = _column(first, ranks, BLOCK_COLUMNS)
        source = matrix + at * row_stride + rank[None, :] * rank_stride
        values = tl.load(source, mask=exists, other=0.0).to(tl.float32) * _step(norms, rank)
        row_scale = tl.maximum(row_scale, tl.max(tl.abs(values), 1) / 448.0)
    tl.store(larger_scale + row, row_scale, mask=row < rows)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        column, rank, block = _column(first, ranks, BLOCK_COLUMNS)
        source = matrix + at * row_stride + rank[None, :] * rank_stride
        values = tl.load(source, mask=exists, other=0.0).to(tl.float32) * _step(norms, rank)
        to = fp8 + at * fp8_stride + first_column + column[None, :]
        result = _high_or_low(values / row_scale[:, None], block, LOW_BLOCK=2)
        tl.store(to, result.to(fp8.dtype.element_ty), mask=exists & (column < num_columns)[None, :])


def num_columns(ranks: int) -> int:
    """All columns of LoRA with some ranks. Zeros follow the blocks, so that rows start at a cache line."""
    width: int = BLOCKS.value * ranks
    return width + -width % ALIGNMENT


def append(rows: Rows, low_rank: Tensor, norms: Tensor) -> None:
    """Writes LoRA's columns of rows.fp8.

    low_rank: rows A^T, (tokens, ranks); norms: of the rows of A, (ranks,), float32.
    """
    assert rows.fp8 is not None
    tokens, ranks = low_rank.shape
    columns = num_columns(ranks)
    _append[(triton.cdiv(tokens, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))](
        low_rank, norms, rows.fp8, rows.scale, tokens, ranks, columns, rows.fp8.shape[1] - columns, rows.fp8_stride,
        BLOCK_TOKENS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip


def append_to_weights(lora: LoraColumns, scale: Tensor, fp8: Tensor) -> Tensor:
    """Writes LoRA's columns of `fp8`, (rows, features + columns). Returns the scale that its rows then have.

    scale: (rows,), float32, the smallest one that the weights allow.
    """
    rows, ranks = lora.matrix.shape
    columns = num_columns(ranks)
    larger_scale = torch.empty_like(scale)
    _append_to_weights[(triton.cdiv(rows, BLOCK_ROWS),)](
        lora.matrix, lora.norms, fp8, scale, larger_scale, rows, ranks, *lora.matrix.stride(),
        columns, fp8.shape[1] - columns, fp8.stride(0), BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    return larger_scale
