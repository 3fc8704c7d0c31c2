"""Cross-entropy of hidden states under a frozen head, without the logits of a whole batch.

The logits of 32,768 positions over 128,256 tokens are 8.4 GB in bfloat16 and 16.8 GB in float32. They are made in
chunks, and each chunk's gradient of the hidden states at once, as in Liger's fused linear cross-entropy (Hsu et al.
2024): two products of 2 * positions * vocabulary * hidden FLOP in all, and no third in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.tokens import IGNORED

LOGITS_OF_A_CHUNK = 2**28  # 0.5 GiB in bfloat16


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed nats of the targets, a float32 scalar; differentiable in `hidden`, once.

    hidden: (positions, hidden); weight: the head's, (vocabulary, hidden), frozen; targets: (positions,), or IGNORED.
    """
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return nats


def nats_per_target(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, (positions,), float32; arguments as above."""
    parts = zip(_chunks(hidden, weight), _chunks(targets, weight), strict=True)
    return torch.cat([_cross_entropy_(h @ weight.t(), t, gradient=False) for h, t in parts])


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = rows.split(max(1, LOGITS_OF_A_CHUNK // weight.shape[0]))
    return chunks


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(hidden)
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts = zip(*(_chunks(rows, weight) for rows in (hidden, targets, ctx.gradient)), strict=True)
        for hidden_part, targets_part, gradient in parts:
            logits = hidden_part @ weight.t()
            nats += _cross_entropy_(logits, targets_part, gradient=True).sum()
            torch.mm(logits, weight, out=gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grad), None, None


def _cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Nats of each row, (rows,), float32; with `gradient` the logits become the gradient of their sum.

    logits: (rows, vocabulary).
    """
    if logits.is_cuda:
        from pdf2lora.kernels.cross_entropy import cross_entropy_ as on_gpu

        return on_gpu(logits, targets, gradient=gradient)
    counted = targets != IGNORED
    log_probabilities = logits.float().log_softmax(-1)
    target = targets.clamp(min=0)[:, None]
    nats = torch.where(counted, -log_probabilities.gather(1, target)[:, 0], 0.0)
    if gradient:
        probabilities = log_probabilities.exp_()
        probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
        logits.copy_(probabilities * counted[:, None])
    return nats
