"""LoRA beside a frozen product: y += scaling * (dropout(x) A^T) B^T, for the projections that read one x.

PEFT writes dropout(x) to memory for each projection, forward and backward, and converts x to float32. Here x is read
once, dropped in registers and multiplied at once: 2 bytes a feature in the forward pass, 6 in the backward pass. The
mask is never stored. It is drawn again from its seed: eight neighbouring features share one call of Philox4x32-7
(Salmon et al. 2011, Parallel Random Numbers: seven rounds pass BigCrush), each taking 16 of its bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DRAWS = tl.constexpr(8)  # of 16 bits, from one call of Philox
RESOLUTION = 1 << 16
# Tiles, measured on one H100 at 32,768 tokens and 3,072 features.
DOWN = {"BLOCK_TOKENS": 64, "BLOCK": 64, "num_warps": 4}
BACKWARD = {"BLOCK_TOKENS": 64, "BLOCK": 32, "num_warps": 4}
TOKENS_OF_A_SPLIT = 2048  # whose share of A's gradient one program sums, in order: the result does not vary


@triton.jit
def _kept(seed, token, block, num_features, threshold, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Which of BLOCK_TOKENS x BLOCK elements dropout keeps; a function of seed, token and feature alone."""
    group = block * (BLOCK // DRAWS) + tl.arange(0, BLOCK // DRAWS)
    counter = token[:, None] * tl.cdiv(num_features, DRAWS) + group[None, :]
    a, b, c, d = tl.randint4x(seed, counter, 7)
    a = tl.join(a, a >> 16)
    b = tl.join(b, b >> 16)
    c = tl.join(c, c >> 16)
    d = tl.join(d, d >> 16)
    draws = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_TOKENS, BLOCK))
    return (draws & 0xFFFF) >= threshold


@triton.jit(do_not_specialize=["seed"])
def _down(
    x, a, low_rank, seed, tokens, num_features, threshold, scale,
    R: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    projection, projections = tl.program_id(0), tl.num_programs(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rank = tl.arange(0, R)
    total = tl.zeros((BLOCK_TOKENS, R), dtype=tl.float32)
    for block in range(tl.cdiv(num_features, BLOCK)):
        feature = block * BLOCK + tl.arange(0, BLOCK)
        inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * num_features + feature[None, :], mask=inside, other=0.0)
        if DROPOUT:
            kept = _kept(seed + projection, token, block, num_features, threshold, BLOCK_TOKENS, BLOCK)
            values = tl.where(kept, values, 0.0)
        matrix = tl.load(
            a + (projection * R + rank)[None, :] * num_features + feature[:, None],
            mask=(feature < num_features)[:, None],
            other=0.0,
        )
        total = tl.dot(values, matrix, total, input_precision="ieee")
    at = low_rank + token.to(tl.int64)[:, None] * (projections * R) + (projection * R + rank)[None, :]
    tl.store(at, (total * scale).to(low_rank.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=["seed"])
def _backward(
    x, grad_x, a, grad_low_rank, grad_a, seed, tokens, num_features, threshold, scale,
    PROJECTIONS: tl.constexpr, R: tl.constexpr, DROPOUT: tl.constexpr, GRAD_X: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    feature = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, R)
    first = tl.zeros((R, BLOCK), dtype=tl.float32)
    second = tl.zeros((R, BLOCK), dtype=tl.float32)
    third = tl.zeros((R, BLOCK), dtype=tl.float32)
    for start in range(0, SPLIT, BLOCK_TOKENS):
        token = split * SPLIT + start + tl.arange(0, BLOCK_TOKENS)
        inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
        at = token.to(tl.int64)[:, None] * num_features + feature[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        if GRAD_X:
            grad = tl.load(grad_x + at, mask=inside, other=0.0).to(tl.float32)
        for projection in tl.static_range(PROJECTIONS):
            low_rank_at = token.to(tl.int64)[:, None] * (PROJECTIONS * R) + (projection * R + rank)[None, :]
            low_rank = tl.load(grad_low_rank + low_rank_at, mask=(token < tokens)[:, None], other=0.0)
            dropped = values
            if DROPOUT:
                kept = _kept(seed + projection, token, block, num_features, threshold, BLOCK_TOKENS, BLOCK)
                dropped = tl.where(kept, values, 0.0)
            if projection == 0:
                first = tl.dot(tl.trans(low_rank), dropped, first, input_precision="ieee")
            elif projection == 1:
                second = tl.dot(tl.trans(low_rank), dropped, second, input_precision="ieee")
            else:
                third = tl.dot(tl.trans(low_rank), dropped, third, input_precision="ieee")
            if GRAD_X:
                matrix = tl.load(
                    a + (projection * R + rank)[:, None] * num_features + feature[None, :],
                    mask=(feature < num_features)[None, :],
                    other=0.0,
                )
                through = tl.dot(low_rank, matrix, input_precision="ieee") * scale
                if DROPOUT:
                    through = tl.where(kept, through, 0.0)
                grad += through
        if GRAD_X:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
    row = grad_a + (split * PROJECTIONS * R + rank).to(tl.int64)[:, None] * num_features + feature[None, :]
    within = (feature < num_features)[None, :]
    tl.store(row, first * scale, mask=within)
    if PROJECTIONS > 1:
        tl.store(row + R * num_features, second * scale, mask=within)
    if PROJECTIONS > 2:
        tl.store(row + 2 * R * num_features, third * scale, mask=within)


@dataclass(frozen=True)
class Dropout:
    """Dropout of a LoRA's input; p is met to 1 / 65536, and the scale is that of the p which is met."""

    p: float

    @property
    def threshold(self) -> int:
        return round(self.p * RESOLUTION)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.threshold / RESOLUTION)


def down(x: Tensor, a: Tensor, rank: int, dropout: Dropout, seed: int) -> Tensor:
    """dropout(x) A^T for all projections, (tokens, projections * rank); projection i draws from seed + i.

    x: (tokens, features); a: (projections * rank, features); rank: a power of two, 16 or more.
    """
    tokens, features = x.shape
    low_rank = torch.empty(tokens, a.shape[0], dtype=x.dtype, device=x.device)
    _down[(a.shape[0] // rank, triton.cdiv(tokens, DOWN["BLOCK_TOKENS"]))](
        x, a, low_rank, seed, tokens, features, dropout.threshold, dropout.scale,
        R=rank, DROPOUT=dropout.threshold > 0, **DOWN,
    )  # fmt: skip
    return low_rank


def backward_(
    x: Tensor, grad_x: Tensor | None, a: Tensor, grad_low_rank: Tensor, rank: int, dropout: Dropout, seed: int
) -> Tensor:
    """A's gradient, (projections * rank, features), float32; adds x's to `grad_x` in place, where there is one.

    x, grad_x: (tokens, features); grad_low_rank: (tokens, projections * rank).
    """
    tokens, features = x.shape
    projections = a.shape[0] // rank
    splits = triton.cdiv(tokens, TOKENS_OF_A_SPLIT)
    partial = torch.empty(splits, a.shape[0], features, dtype=torch.float32, device=x.device)
    _backward[(triton.cdiv(features, BACKWARD["BLOCK"]), splits)](
        x, grad_x, a, grad_low_rank, partial, seed, tokens, features, dropout.threshold, dropout.scale,
        PROJECTIONS=projections, R=rank, DROPOUT=dropout.threshold > 0, GRAD_X=grad_x is not None,
        SPLIT=TOKENS_OF_A_SPLIT, **BACKWARD,
    )  # fmt: skip
    return partial.sum(0)
