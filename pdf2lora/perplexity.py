"""Perplexity = exp(summed nats / counted tokens): each token of the test documents is scored once.

Not the mean over batches of each batch's mean loss, which weighs the tokens of a short batch more. Bits per byte and
word perplexity count the same nats against the text instead of its tokens, and so compare across tokenizers (Gao et
al. 2020, The Pile, section 3.1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pdf2lora.forward import Forward
from pdf2lora.loss import nats_per_target
from pdf2lora.tokens import IGNORED, Window

Nats = NDArray[np.float64]


@dataclass(frozen=True)
class TextSize:
    """What one document's nats are divided by."""

    tokens: int
    bytes: int  # UTF-8
    words: int


@torch.no_grad()
def nats_per_document(
    forward: Forward,
    windows: Sequence[Window],
    *,
    num_documents: int,
    per_device_batch: int,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Nats:
    """Negative log-likelihood of each document, (num_documents,), summed over the targets of its windows.

    The model is left in eval mode.
    """
    forward.model.eval()
    head = forward.head
    nats = torch.zeros(num_documents, dtype=torch.float64, device=head.device)
    for first in range(0, len(windows), per_device_batch):
        batch = windows[first : first + per_device_batch]
        inputs = torch.from_numpy(np.stack([window.input_ids for window in batch])).to(head.device)
        targets = torch.from_numpy(np.stack([window.targets for window in batch])).to(head.device)
        owners = torch.tensor([window.document for window in batch], device=head.device)
        counted = targets != IGNORED
        scores = nats_per_target(forward(inputs)[counted], head, targets[counted])
        nats.index_add_(0, owners[:, None].expand_as(targets)[counted], scores.double())
        progress(len(batch))
    return nats.cpu().numpy()


def summary(nats: Nats, sizes: Sequence[TextSize]) -> dict[str, float]:
    """The numbers of one model over all documents."""
    total = float(nats.sum())
    return {
        "perplexity": math.exp(total / sum(size.tokens for size in sizes)),
        "bits_per_byte": total / math.log(2) / sum(size.bytes for size in sizes),
        "word_perplexity": math.exp(total / sum(size.words for size in sizes)),
    }


def bootstrap(
    base: Nats, adapted: Nats, sizes: Sequence[TextSize], *, num_samples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95% intervals of both perplexities and of the improvement, 1 - adapted / base.

    Documents are drawn with replacement, the same draw for both models (Efron and Tibshirani 1993): tokens of a
    document are not independent, documents nearly are.
    """
    tokens = np.array([size.tokens for size in sizes])
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(num_samples, len(sizes)))
    counted = tokens[drawn].sum(axis=1)
    perplexity = {
        name: np.exp(nats[drawn].sum(axis=1) / counted) for name, nats in (("base", base), ("adapted", adapted))
    }
    perplexity["improvement"] = 1 - perplexity["adapted"] / perplexity["base"]
    return {name: (float(low), float(high)) for name, (low, high) in _intervals(perplexity)}


def _intervals(samples: dict[str, Nats]) -> list[tuple[str, Nats]]:
    return [(name, np.quantile(values, [0.025, 0.975])) for name, values in samples.items()]
