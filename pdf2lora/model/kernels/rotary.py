"""Rotary position embeddings of queries and keys (Su et al. 2021), and the RMSNorm before them in some models.

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


class HeadNorm(NamedTuple):
    """RMSNorm over each head of queries and keys, before the rotation (Qwen3).

    weight: (2, head_dim), of queries and of keys, frozen.
    """

    weight: Tensor
    eps: float


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
def _load_head(row, inside, HALF: tl.constexpr):
    """Both halves of a head, in float32; row: addresses of the first half."""
    first = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _inverse_rms(first, second, eps, HALF: tl.constexpr):
    """1 / RMS of each head, (tokens, 1)."""
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def _rotate(
    source, target, cos, sin, weight, eps, tokens, seq_length, source_stride, target_stride,
    NUM_QUERIES: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_HALF)
    inside = (token < tokens)[:, None] & (column < HALF)[None, :]
    at = head * 2 * HALF + column[None, :]
    first, second = _load_head(source + token.to(tl.int64)[:, None] * source_stride + at, inside, HALF)
    if NORM:
        inverse = _inverse_rms(first, second, eps, HALF)
        own = weight + (head >= NUM_QUERIES).to(tl.int32) * 2 * HALF + column
        first *= inverse * tl.load(own, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        second *= inverse * tl.load(own + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        c, s = _load_angles(cos, sin, token, column, inside, seq_length, HALF)
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    row = target + token.to(tl.int64)[:, None] * target_stride + at
    tl.store(row, first.to(target.dtype.element_ty), mask=inside)
    tl.store(row + HALF, second.to(target.dtype.element_ty), mask=inside)


def rotate_(qkv: Tensor, angles: Angles, heads: Heads) -> None:
    """Rotates queries and keys in place.

    qkv: (tokens, heads.width); token t is at position t % heads.seq_length. Reads and writes 2 bytes per feature.
    """
    _launch_rotate(qkv, qkv, angles, heads, None)


def normalize_and_rotate(qkv: Tensor, angles: Angles | None, heads: Heads, norm: HeadNorm) -> Tensor:
    """Normalizes each head of queries and keys, then rotates it; `qkv` stays, for the backward pass.

    Returns queries and keys, (tokens, (num_queries + num_keys) * head_dim). Without angles it does not rotate.
    """
    rows = qkv.new_empty(qkv.shape[0], (heads.num_queries + heads.num_keys) * heads.head_dim)
    _launch_rotate(qkv, rows, angles, heads, norm)
    return rows


def _launch_rotate(source: Tensor, target: Tensor, angles: Angles | None, heads: Heads, norm: HeadNorm | None) -> None:
    tokens, half = source.shape[0], heads.head_dim // 2
    _rotate[(triton.cdiv(tokens, BLOCK_TOKENS), heads.num_queries + heads.num_keys)](
        source, target, angles and angles.cos, angles and angles.sin, norm and norm.weight, norm.eps if norm else 0.0,
        tokens, heads.seq_length, source.stride(0), target.stride(0),
        NUM_QUERIES=heads.num_queries, NORM=norm is not None, ROTATE=angles is not None,
        HALF=half, BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_HALF=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotary_backward(
    grad, rows, product, cos, sin, weight, eps, b, grad_low_rank, tokens, seq_length,
    batch_stride, head_stride, position_stride, row_stride,
    FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr,
    FIRST_RANK: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_HALF)
    inside = (token < tokens)[:, None] & (column < HALF)[None, :]
    of_token = (token // seq_length).to(tl.int64) * batch_stride + (token % seq_length).to(tl.int64) * position_stride
    source = grad + of_token[:, None] + column[None, :]
    own = token.to(tl.int64)[:, None] * row_stride + FIRST_HEAD * 2 * HALF + column[None, :]
    rank = FIRST_RANK + tl.arange(0, R)
    total = tl.zeros((BLOCK_TOKENS, R), dtype=tl.float32)
    if ROTATE:
        c, s = _load_angles(cos, sin, token, column, inside, seq_length, HALF)
    if NORM:
        first_weight = tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    for head in range(NUM_HEADS):
        first, second = _load_head(source + head * head_stride, inside, HALF)
        if ROTATE:
            unrotated = first * c + second * s
            second = second * c - first * s
            first = unrotated
        if NORM:
            x, y = _load_head(product + own + head * 2 * HALF, inside, HALF)
            inverse = _inverse_rms(x, y, eps, HALF)
            x *= inverse
            y *= inverse
            first *= first_weight
            second *= second_weight
            mean = ((tl.sum(first * x, 1) + tl.sum(second * y, 1)) / (2 * HALF))[:, None]
            first = inverse * (first - x * mean)
            second = inverse * (second - y * mean)
        first_half, second_half = first.to(rows.dtype.element_ty), second.to(rows.dtype.element_ty)
        tl.store(rows + own + head * 2 * HALF, first_half, mask=inside)
        tl.store(rows + own + head * 2 * HALF + HALF, second_half, mask=inside)
        if FIRST_RANK >= 0:
            row = (FIRST_HEAD + head) * 2 * HALF
            left, right = _load_b(b, row, column, rank, WIDTH, HALF), _load_b(b, row + HALF, column, rank, WIDTH, HALF)
            total = tl.dot(first_half, left, total, input_precision="ieee")
            total = tl.dot(second_half, right, total, input_precision="ieee")
    if FIRST_RANK >= 0:
        at = grad_low_rank + token.to(tl.int64)[:, None] * WIDTH + rank[None, :]
        tl.store(at, total.to(grad_low_rank.dtype.element_ty), mask=(token < tokens)[:, None])


def rotary_backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    angles: Angles | None,
    heads: Heads,
    up: Up | None,
    qkv: Tensor | None = None,
    norm: HeadNorm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the product of q, k and v, and of LoRA's first product.

    gradients: of rotated queries, rotated keys and values, (batch, heads, seq_length, head_dim) each. The last stride
    is 1, the others are free. qkv: the product, (tokens, heads.width), if there is a norm.
    Returns (tokens, heads.width) and, times B, (tokens, ranks of all); the second is None without `up`. Reads and
    writes 2 bytes per feature (with a norm it reads 4). A separate product with B would read 2 more.
    """
    tokens, half = gradients[0].shape[0] * heads.seq_length, heads.head_dim // 2
    rows = gradients[0].new_empty(tokens, heads.width)
    grad_low_rank = rows.new_empty(tokens, up.b.shape[1]) if up else None
    first_head = 0
    for number, grad in enumerate(gradients):
        has_norm, is_rotated = norm is not None and number < 2, angles is not None and number < 2
        block_half = max(16, triton.next_power_of_2(half))
        # The tiles of gradient, product and B must fit into 99 KiB of shared memory, the limit of consumer GPUs.
        block_tokens = BLOCK_TOKENS * 64 // max(64, block_half) // (2 if has_norm else 1)
        _rotary_backward[(triton.cdiv(tokens, block_tokens),)](
            grad, rows, qkv if has_norm else None, angles and angles.cos, angles and angles.sin,
            norm.weight[number] if norm and has_norm else None, norm.eps if norm else 0.0, up and up.b, grad_low_rank,
            tokens, heads.seq_length, *grad.stride()[:3], rows.stride(0),
            FIRST_HEAD=first_head, NUM_HEADS=grad.shape[1], NORM=has_norm, ROTATE=is_rotated, HALF=half,
            FIRST_RANK=up.first_ranks[number] if up else -1, R=up.rank if up else 16, WIDTH=up.b.shape[1] if up else 0,
            BLOCK_TOKENS=block_tokens, BLOCK_HALF=block_half, num_warps=4,
        )  # fmt: skip
        first_head += grad.shape[1]
    return rows, grad_low_rank
