"""LoRA's small products without dropout.

The backward pass multiplies the same wide rows twice: x by A and by the gradient of LoRA's first product, and the
gradient of y by B and by the first product itself. One kernel reads the rows once for both. Memory bandwidth limits it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_TOKENS": 128, "BLOCK": 128, "SPLIT": 2048, "num_warps": 8, "num_stages": 2}
# The fastest one on one H200. It needs tensor cores that read both factors from shared memory.
HOPPER_TILE = {"BLOCK_TOKENS": 64, "BLOCK": 512, "SPLIT": 2048, "num_warps": 4, "num_stages": 2}
HOPPER = 9  # major number of its compute capability
MIN_ELEMENTS = 2**26  # of rows: with fewer, the two products of cuBLAS are faster (one H200)
MAX_RANK = 32  # more partial sums do not fit into registers


def one_kernel_is_faster(rows: Tensor, rank: int) -> bool:
    """True if both_products() is faster than two products."""
    return rows.numel() >= MIN_ELEMENTS and rank <= MAX_RANK


@triton.jit
def _both_products(
    rows, right, left, products, sums, tokens, num_features, row_stride, right_stride, right_rank_stride, left_stride,
    R: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    feature, rank = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, R)
    within = feature < num_features
    right_at = feature[:, None] * right_stride + rank[None, :] * right_rank_stride
    matrix = tl.load(right + right_at, mask=within[:, None], other=0.0)
    total = tl.zeros((R, BLOCK), dtype=tl.float32)
    for start in range(0, SPLIT, BLOCK_TOKENS):
        token = split * SPLIT + start + tl.arange(0, BLOCK_TOKENS)
        row, exists = token.to(tl.int64)[:, None], (token < tokens)[:, None]
        values = tl.load(rows + row * row_stride + feature[None, :], mask=exists & within[None, :], other=0.0)
        factor = tl.load(left + row * left_stride + rank[None, :], mask=exists, other=0.0)
        total = tl.dot(tl.trans(factor), values, total, input_precision="ieee")
        product = tl.dot(values, matrix, input_precision="ieee")
        tl.store(products + (block.to(tl.int64) * tokens + row) * R + rank[None, :], product, mask=exists)
    at = (split * R + rank)[:, None].to(tl.int64) * num_features + feature[None, :]
    tl.store(sums + at, total, mask=within[None, :])


def both_products(rows: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """(rows right, left^T rows): (tokens, rank) in the data type of rows, and (rank, features) in float32.

    rows: (tokens, features), last stride 1; right: (features, rank); left: (tokens, rank), last stride 1. The sums over
    blocks of features and over tokens have a fixed order.
    """
    (tokens, features), rank = rows.shape, left.shape[1]
    is_hopper = rows.is_cuda and torch.cuda.get_device_capability(rows.device)[0] == HOPPER
    tile = HOPPER_TILE if is_hopper and rank == 16 else TILE
    blocks, splits = triton.cdiv(features, tile["BLOCK"]), triton.cdiv(tokens, tile["SPLIT"])
    products = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=rows.device)
    sums = torch.empty(splits, rank, features, dtype=torch.float32, device=rows.device)
    _both_products[(blocks, splits)](
        rows, right, left, products, sums, tokens, features, rows.stride(0), *right.stride(), left.stride(0),
        R=rank, **tile,
    )  # fmt: skip
    return products.sum(0).to(rows.dtype), sums.sum(0)


def product_float32(left: Tensor, right: Tensor) -> Tensor:
    """left right, with the sums of tensor cores in float32 and no rounding to the data type of the factors."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
