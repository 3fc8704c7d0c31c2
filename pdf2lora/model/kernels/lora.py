"""LoRA with dropout, in addition to a frozen product: y += scaling * (dropout(x) A^T) B^T.

One to three projections read one x. Without dropout see lora_products.py.

PEFT writes dropout(x) to memory for each projection, in both passes, and converts x to float32. These kernels apply
dropout in registers and multiply at once. They read x once in each pass (2 bytes per feature) and add LoRA's part to
the gradient of x (4 bytes). The forward pass stores the mask, one bit per feature and projection: drawing it a second
time took nearly half of the backward pass's instructions.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.dropout import DropoutRate
from pdf2lora.model.kernels.dropout import FEATURES_PER_CALL, draw, unpack

MAX_LORA_RANK = 256  # a tile must fit into registers and into 99 KiB of shared memory, the limit of consumer GPUs
TOKENS_OF_A_SPLIT = 2048  # one program sums their part of A's gradient in a fixed order, so the result is deterministic


class DropoutCounter(NamedTuple):
    """Selects the random bits of the projections that read one x: see pdf2lora.model.dropout.

    state: (2,), int64, [seed, first_sequence]; layer_index: of the first projection, the others follow it;
    first_token: index of the first row of x in the micro-batch.
    """

    state: Tensor
    layer_index: int
    seq_length: int
    rate: DropoutRate
    first_token: int = 0


@triton.jit
def _bytes(mask, projection, token, block, tokens, num_features, BLOCK: tl.constexpr):
    """Addresses of the bytes of BLOCK_TOKENS x BLOCK elements in a packed mask, and which of them exist."""
    group = block * (BLOCK // FEATURES_PER_CALL) + tl.arange(0, BLOCK // FEATURES_PER_CALL)
    row = (projection * tokens + token).to(tl.int64)[:, None]
    inside = (token < tokens)[:, None] & (group * FEATURES_PER_CALL < num_features)[None, :]
    return mask + row * tl.cdiv(num_features, FEATURES_PER_CALL) + group[None, :], inside


@triton.jit(do_not_specialize=["layer_index", "first_token"])
def _down(
    x, a, low_rank, mask, state, layer_index, first_token, tokens, seq_length, num_features, threshold, scale,
    R: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    projection, projections = tl.program_id(0), tl.num_programs(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rank = tl.arange(0, R)
    total = tl.zeros((BLOCK_TOKENS, R), dtype=tl.float32)
    for block in range(tl.cdiv(num_features, BLOCK)):
        feature = block * BLOCK + tl.arange(0, BLOCK)
        inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * num_features + feature[None, :], mask=inside, other=0.0)
        packed = draw(state, layer_index + projection, first_token + token, seq_length, block, threshold, BLOCK)
        byte, exist = _bytes(mask, projection, token, block, tokens, num_features, BLOCK)
        tl.store(byte, packed.to(tl.uint8), mask=exist)
        values = tl.where(unpack(packed, BLOCK_TOKENS, BLOCK), values, 0.0)
        matrix = tl.load(
            a + (projection * R + rank)[None, :] * num_features + feature[:, None],
            mask=(feature < num_features)[:, None],
            other=0.0,
        )
        total = tl.dot(values, matrix, total, input_precision="ieee")
    at = low_rank + token.to(tl.int64)[:, None] * (projections * R) + (projection * R + rank)[None, :]
    tl.store(at, (total * scale).to(low_rank.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit
def _gradient_of_a(
    x, grad_low_rank, grad_a, mask, tokens, num_features, scale,
    R: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    projection, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    projections = tl.num_programs(0)
    feature = block * BLOCK + tl.arange(0, BLOCK)
    rank = projection * R + tl.arange(0, R)
    within = (feature < num_features)[None, :]
    total = tl.zeros((R, BLOCK), dtype=tl.float32)
    for start in tl.range(0, SPLIT, BLOCK_TOKENS, num_stages=STAGES):
        token = split * SPLIT + start + tl.arange(0, BLOCK_TOKENS)
        values = tl.load(
            x + token.to(tl.int64)[:, None] * num_features + feature[None, :],
            mask=(token < tokens)[:, None] & within,
            other=0.0,
        )
        byte, exist = _bytes(mask, projection, token, block, tokens, num_features, BLOCK)
        kept = unpack(tl.load(byte, mask=exist, other=0).to(tl.int32), BLOCK_TOKENS, BLOCK)
        values = tl.where(kept, values, 0.0)
        low_rank_at = token.to(tl.int64)[:, None] * (projections * R) + rank[None, :]
        low_rank = tl.load(grad_low_rank + low_rank_at, mask=(token < tokens)[:, None], other=0.0)
        total = tl.dot(tl.trans(low_rank), values, total, input_precision="ieee")
    row = split.to(tl.int64) * (projections * R) + rank
    tl.store(grad_a + row[:, None] * num_features + feature[None, :], total * scale, mask=within)


@triton.jit
def _add_gradient_of_x(
    grad_x, a, grad_low_rank, mask, tokens, num_features, scale,
    PROJECTIONS: tl.constexpr, R: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    feature = block * BLOCK + tl.arange(0, BLOCK)
    within = (feature < num_features)[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK), dtype=tl.float32)
    for projection in tl.static_range(PROJECTIONS):
        rank = projection * R + tl.arange(0, R)
        low_rank_at = token.to(tl.int64)[:, None] * (PROJECTIONS * R) + rank[None, :]
        low_rank = tl.load(grad_low_rank + low_rank_at, mask=(token < tokens)[:, None], other=0.0)
        matrix = tl.load(a + rank[:, None] * num_features + feature[None, :], mask=within, other=0.0)
        through = tl.dot(low_rank, matrix, input_precision="ieee")
        byte, exist = _bytes(mask, projection, token, block, tokens, num_features, BLOCK)
        kept = unpack(tl.load(byte, mask=exist, other=0).to(tl.int32), BLOCK_TOKENS, BLOCK)
        total += tl.where(kept, through, 0.0)
    at = token.to(tl.int64)[:, None] * num_features + feature[None, :]
    inside = (token < tokens)[:, None] & within
    grad = tl.load(grad_x + at, mask=inside, other=0.0).to(tl.float32) + total * scale
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)


# Small ranks: the fastest tiles on one H200 (24,576 tokens, 3,072 and 8,192 features). Large ranks: tiles that fit.


def _down_tile(rank: int) -> dict[str, int]:
    if rank > 64:
        return {"BLOCK_TOKENS": 16, "BLOCK": 64, "num_warps": 4}
    return {"BLOCK_TOKENS": 16, "BLOCK": 128, "num_warps": 2}  # fewer warps wait less for each other


def _gradient_of_a_tile(rank: int, projections: int) -> dict[str, int]:
    if rank > 64:
        return {"BLOCK_TOKENS": 16, "BLOCK": 32, "STAGES": 1, "num_warps": 8}
    if projections == 1:
        return {"BLOCK_TOKENS": 64, "BLOCK": 64, "STAGES": 3, "num_warps": 4}
    return {"BLOCK_TOKENS": 32, "BLOCK": 64, "STAGES": 1, "num_warps": 2}


def _gradient_of_x_tile(rank: int, projections: int) -> dict[str, int]:
    if rank > 64:
        return {"BLOCK_TOKENS": 16, "BLOCK": 32, "num_warps": 8}
    if projections > 1:
        return {"BLOCK_TOKENS": 16, "BLOCK": 64, "num_warps": 1}
    return {"BLOCK_TOKENS": 16, "BLOCK": 128, "num_warps": 2}


class LowRank(NamedTuple):
    """dropout(x) A^T of all projections that read x, and the packed dropout masks.

    values: (tokens, projections * rank).
    mask: (projections, tokens, features / 8), uint8, feature 8 i + j in bit j of byte i. None: no dropout.
    """

    values: Tensor
    mask: Tensor | None


def down(x: Tensor, a: Tensor, rank: int, dropout: DropoutCounter) -> tuple[Tensor, Tensor]:
    """The values and the mask of LowRank for all projections.

    x: (tokens, features); a: (projections * rank, features); rank: a power of two, 16 to MAX_LORA_RANK.
    """
    tokens, features = x.shape
    projections = a.shape[0] // rank
    low_rank = torch.empty(tokens, a.shape[0], dtype=x.dtype, device=x.device)
    num_bytes = triton.cdiv(features, FEATURES_PER_CALL.value)
    mask = torch.empty(projections, tokens, num_bytes, dtype=torch.uint8, device=x.device)
    tile = _down_tile(rank)
    _down[(projections, triton.cdiv(tokens, tile["BLOCK_TOKENS"]))](
        x, a, low_rank, mask, dropout.state, dropout.layer_index, dropout.first_token, tokens, dropout.seq_length,
        features, dropout.rate.threshold, dropout.rate.scale,
        R=rank, **tile,
    )  # fmt: skip
    return low_rank, mask


def gradient_of_a(x: Tensor, grad_low_rank: Tensor, rank: int, mask: Tensor, scale: float) -> Tensor:
    """The gradient of A, (projections * rank, features), float32.

    x: (tokens, features); grad_low_rank: (tokens, projections * rank).
    """
    tokens, features = x.shape
    ranks = grad_low_rank.shape[1]
    projections = ranks // rank
    splits = triton.cdiv(tokens, TOKENS_OF_A_SPLIT)
    partial = torch.empty(splits, ranks, features, dtype=torch.float32, device=x.device)
    tile = _gradient_of_a_tile(rank, projections)
    _gradient_of_a[(projections, triton.cdiv(features, tile["BLOCK"]), splits)](
        x, grad_low_rank, partial, mask, tokens, features, scale,
        R=rank, SPLIT=TOKENS_OF_A_SPLIT, **tile,
    )  # fmt: skip
    return partial.sum(0)


def add_gradient_of_x_(grad_x: Tensor, a: Tensor, grad_low_rank: Tensor, rank: int, mask: Tensor, scale: float) -> None:
    """Adds LoRA's part to `grad_x`, (tokens, features), in place.

    a: (projections * rank, features).
    """
    tokens, features = grad_x.shape
    projections = a.shape[0] // rank
    tile = _gradient_of_x_tile(rank, projections)
    _add_gradient_of_x[(triton.cdiv(features, tile["BLOCK"]), triton.cdiv(tokens, tile["BLOCK_TOKENS"]))](
        grad_x, a, grad_low_rank, mask, tokens, features, scale,
        PROJECTIONS=projections, R=rank, **tile,
    )  # fmt: skip
