"""Cross-entropy of a chunk of logits on the GPU. Reads the logits twice and overwrites them with the gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdf2lora.model.kernels.rows import block_and_warps


@triton.jit
def _cross_entropy(logits, targets, nats, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * vocabulary
    target = tl.load(targets + row)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):  # Milakov and Gimelshein 2018, online softmax
        column = start + tl.arange(0, BLOCK)
        x = tl.load(own + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    log_total = largest + tl.log(total)
    counted = target >= 0
    picked = tl.load(own + tl.maximum(target, 0)).to(tl.float32)
    tl.store(nats + row, tl.where(counted, log_total - picked, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(own + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(own + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


def cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """See pdf2lora.model.loss._cross_entropy_."""
    rows, vocabulary = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block, warps = block_and_warps(min(vocabulary, 2**15))
    _cross_entropy[(rows,)](logits, targets, nats, vocabulary, GRADIENT=gradient, BLOCK=block, num_warps=warps)
    return nats
