"""Cross-entropy of hidden states under a frozen head, without the logits of a whole batch in memory.

The logits of 32,768 positions over 128,256 tokens are 8.4 GB in bfloat16 and 16.8 GB in float32. This module computes
the logits in chunks, and the gradient of the hidden states together with each chunk, as Liger's fused linear
cross-entropy does (Hsu et al. 2024). A step costs two products of 2 * positions * vocabulary * hidden FLOP. The
backward pass needs no further product.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.head import Head
from pdf2lora.tokens import IGNORED

LOGITS_PER_CHUNK = 2**28  # 0.5 GiB in bfloat16
TILE = 256  # the positions of a chunk are a multiple of it, for tensor cores


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """The sum of the targets' nats, a float32 scalar. Only `hidden` gets a gradient, in one backward pass.

    hidden: (positions, hidden); targets: (positions,), token ids or IGNORED.
    """
    nats: Tensor = _LinearCrossEntropy.apply(hidden, head, targets)
    return nats


def nats_per_target(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """-log p of each target, (positions,), float32. The arguments are those of linear_cross_entropy."""
    nats = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for product, part in _chunks(hidden, head.weight):
        nats[part] = _cross_entropy_(head.transform_(product), targets[part], gradient=False)
    return nats


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Chunks of hidden W^T, (positions, vocabulary), and their positions. All chunks share one buffer."""
    rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    rows = min(rows // TILE * TILE or rows, hidden.shape[0])
    logits = hidden.new_empty(rows, weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, min(start + rows, hidden.shape[0]))
        yield torch.mm(hidden[part], weight.t(), out=logits[: part.stop - start]), part


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(hidden)
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for product, part in _chunks(hidden, head.weight):
            logits = head.transform_(product)
            slope = None if head.softcap is None else (logits / head.softcap).square_().neg_().add_(1)  # of the cap
            nats += _cross_entropy_(logits, targets[part], gradient=True).sum()
            if slope is not None:
                logits *= slope
            if head.scale != 1.0:
                logits *= head.scale
            torch.mm(logits, head.weight, out=ctx.gradient[part])
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grad), None, None


def _cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """The nats of each row, (rows,), float32. With `gradient`, the gradient of their sum overwrites the logits.

    logits: (rows, vocabulary).
    """
    if logits.is_cuda:
        from pdf2lora.model.kernels.cross_entropy import cross_entropy_

        return cross_entropy_(logits, targets, gradient=gradient)
    counted = targets != IGNORED
    log_probabilities = logits.float().log_softmax(-1)
    target = targets.clamp(min=0)[:, None]
    nats = torch.where(counted, -log_probabilities.gather(1, target)[:, 0], 0.0)
    if gradient:
        probabilities = log_probabilities.exp_()
        probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
        logits.copy_(probabilities * counted[:, None])
    return nats
