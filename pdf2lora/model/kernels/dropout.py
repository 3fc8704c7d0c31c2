"""Dropout masks on the GPU. model/dropout.py explains the random function and computes the same masks on a CPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model import dropout

FEATURES_PER_CALL = tl.constexpr(dropout.FEATURES_PER_CALL)  # of Philox; also the bits of a byte of a packed mask
ROUNDS = tl.constexpr(dropout.PHILOX_ROUNDS)
BLOCK_TOKENS, BLOCK_FEATURES = 16, 256


@triton.jit
def draw(state, layer_index, token, seq_length, block, threshold, BLOCK: tl.constexpr):
    """Packed mask of BLOCK features from block * BLOCK on: (tokens, BLOCK / 8), int32, each with 8 bits.

    state: pointer to seed and first sequence; token: indices in the micro-batch.
    """
    seed = tl.load(state)
    index = tl.load(state + 1) * seq_length + token
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    group = block * (BLOCK // FEATURES_PER_CALL) + tl.arange(0, BLOCK // FEATURES_PER_CALL)
    layer = tl.full((1, 1), 0, tl.int32) + layer_index
    a, b, c, d = tl.philox(seed, low[:, None], high[:, None], group[None, :], layer, ROUNDS)
    return (
        _two_bits(a, threshold)
        | (_two_bits(b, threshold) << 2)
        | (_two_bits(c, threshold) << 4)
        | (_two_bits(d, threshold) << 6)
    )


@triton.jit
def _two_bits(random, threshold):
    low = ((random & 0xFFFF) >= threshold).to(tl.int32)
    high = (((random >> 16) & 0xFFFF) >= threshold).to(tl.int32)
    return low | (high << 1)


@triton.jit
def unpack(packed, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Packed mask -> whether each of BLOCK_TOKENS x BLOCK elements is kept."""
    bits = (packed[:, :, None] >> tl.arange(0, FEATURES_PER_CALL)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_TOKENS, BLOCK)) != 0


@triton.jit(do_not_specialize=["layer_index"])
def _keep_mask(
    mask, state, layer_index, tokens, seq_length, num_features, threshold,
    BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    block = tl.program_id(1)
    feature = block * BLOCK + tl.arange(0, BLOCK)
    packed = draw(state, layer_index, token, seq_length, block, threshold, BLOCK)
    inside = (token < tokens)[:, None] & (feature < num_features)[None, :]
    at = mask + token.to(tl.int64)[:, None] * num_features + feature[None, :]
    tl.store(at, unpack(packed, BLOCK_TOKENS, BLOCK).to(tl.int8), mask=inside)


def keep_mask(
    state: Tensor, layer_index: int, tokens: int, seq_length: int, num_features: int, threshold: int
) -> Tensor:
    """See pdf2lora.model.dropout.keep_mask."""
    mask = torch.empty(tokens, num_features, dtype=torch.int8, device=state.device)
    _keep_mask[(triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(num_features, BLOCK_FEATURES))](
        mask, state, layer_index, tokens, seq_length, num_features, threshold,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK=BLOCK_FEATURES,
    )  # fmt: skip
    return mask.view(torch.bool)
