"""Rotary position embeddings of queries and keys (Su et al. 2021), forward and backward.

The first half of a head is paired with its second half, as in transformers.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.attention import Heads

BLOCK_TOKENS = 64
MAX_FUSED_ROTARY_RANK = 64  # of LoRA, in rotary_backward; more exceeds the shared memory of consumer GPUs


class Angles(NamedTuple):
    """cos and sin of each position and pair, (seq_length, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor


class Up(NamedTuple):
    """LoRA's B of queries, keys and values.

    b: Projections.b, (heads.width, ranks of all).
    first_ranks: first column of the blocks of queries, keys and values; -1 without LoRA.
    rank: columns of a block.
    """

    b: Tensor
    first_ranks: tuple[int, int, int]
    rank: int


@triton.jit
def _load_angles(cos, sin, token, column, inside, seq_length, HALF: tl.constexpr):
    at = (token % seq_length)[:, None] * HALF + column[None, :]
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _load_b(b, row, column, rank, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """The rows of B for half a head, (columns, ranks)."""
    return tl.load(b + (row + column)[:, None] * WIDTH + rank[None, :], mask=(column < HALF)[:, None], other=0.0)


@triton.jit
def _rotate(
    rows, cos, sin, tokens, seq_length, row_stride,
    HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_HALF)
    inside = (token < tokens)[:, None] & (column < HALF)[None, :]
    c, s = _load_angles(cos, sin, token, column, inside, seq_length, HALF)
    at = rows + token.to(tl.int64)[:, None] * row_stride + tl.program_id(1) * 2 * HALF + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * c - second * s).to(rows.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * c + first * s).to(rows.dtype.element_ty), mask=inside)


def rotate_(rows: Tensor, angles: Angles, heads: Heads) -> None:
    """Rotates queries and keys in place.

    rows: (tokens, heads.width); token t is at position t % heads.seq_length. Reads and writes 2 bytes per feature.
    """
    tokens, half = rows.shape[0], heads.head_dim // 2
    _rotate[(triton.cdiv(tokens, BLOCK_TOKENS), heads.num_queries + heads.num_keys)](
        rows, *angles, tokens, heads.seq_length, rows.stride(0),
        HALF=half, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HALF=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotary_backward(
    grad, rows, cos, sin, b, grad_low_rank, tokens, seq_length, batch_stride, head_stride, position_stride, row_stride,
    FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr,
    FIRST_RANK: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_HALF)
    inside = (token < tokens)[:, None] & (column < HALF)[None, :]
    of_token = (token // seq_length).to(tl.int64) * batch_stride + (token % seq_length).to(tl.int64) * position_stride
    source = grad + of_token[:, None] + column[None, :]
    target = rows + token.to(tl.int64)[:, None] * row_stride + FIRST_HEAD * 2 * HALF + column[None, :]
    rank = FIRST_RANK + tl.arange(0, R)
    total = tl.zeros((BLOCK_TOKENS, R), dtype=tl.float32)
    if ROTATED:
        c, s = _load_angles(cos, sin, token, column, inside, seq_length, HALF)
    for head in range(NUM_HEADS):
        x = tl.load(source + head * head_stride, mask=inside, other=0.0)
        y = tl.load(source + head * head_stride + HALF, mask=inside, other=0.0)
        if ROTATED:
            first, second = x.to(tl.float32), y.to(tl.float32)
            x = (first * c + second * s).to(rows.dtype.element_ty)
            y = (second * c - first * s).to(rows.dtype.element_ty)
        tl.store(target + head * 2 * HALF, x, mask=inside)
        tl.store(target + head * 2 * HALF + HALF, y, mask=inside)
        if FIRST_RANK >= 0:
            row = (FIRST_HEAD + head) * 2 * HALF
            total = tl.dot(x, _load_b(b, row, column, rank, WIDTH, HALF), total, input_precision="ieee")
            total = tl.dot(y, _load_b(b, row + HALF, column, rank, WIDTH, HALF), total, input_precision="ieee")
    if FIRST_RANK >= 0:
        at = grad_low_rank + token.to(tl.int64)[:, None] * WIDTH + rank[None, :]
        tl.store(at, total.to(grad_low_rank.dtype.element_ty), mask=(token < tokens)[:, None])


def rotary_backward(
    gradients: tuple[Tensor, Tensor, Tensor], angles: Angles, heads: Heads, up: Up | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the product of q, k and v, and of LoRA's first product.

    gradients: of rotated queries, rotated keys and values, (batch, heads, seq_length, head_dim) each. The last stride
    is 1, the others are free.
    Returns (tokens, heads.width) and, times B, (tokens, ranks of all); the second is None without `up`. Reads and
    writes 2 bytes per feature. A separate product with B would read 2 more.
    """
    tokens, half = gradients[0].shape[0] * heads.seq_length, heads.head_dim // 2
    rows = gradients[0].new_empty(tokens, heads.width)
    grad_low_rank = rows.new_empty(tokens, up.b.shape[1]) if up else None
    first_head = 0
    for number, grad in enumerate(gradients):
        _rotary_backward[(triton.cdiv(tokens, BLOCK_TOKENS),)](
            grad, rows, *angles, up and up.b, grad_low_rank, tokens, heads.seq_length, *grad.stride()[:3],
            rows.stride(0), FIRST_HEAD=first_head, NUM_HEADS=grad.shape[1], ROTATED=number < 2, HALF=half,
            FIRST_RANK=up.first_ranks[number] if up else -1, R=up.rank if up else 16, WIDTH=up.b.shape[1] if up else 0,
            BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HALF=max(16, triton.next_power_of_2(half)), num_warps=4,
        )  # fmt: skip
        first_head += grad.shape[1]
    return rows, grad_low_rank
