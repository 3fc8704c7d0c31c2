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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pdf2lora.tokens import IGNORED, Window

HEAD_CHUNK = 2048  # positions whose logits exist at a time: float32 logits of a whole batch would be gigabytes

Nats = NDArray[np.float64]


@dataclass(frozen=True)
class TextSize:
    """What one document's nats are divided by."""

    tokens: int
    bytes: int  # UTF-8
    words: int


@torch.no_grad()
def nats_per_document(
    causal_lm: torch.nn.Module,
    windows: Sequence[Window],
    *,
    num_documents: int,
    per_device_batch: int,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Nats:
    """Negative log-likelihood of each document, (num_documents,), summed over the targets of its windows.

    causal_lm: a LlamaForCausalLM (a PEFT model's inner one counts the adapter in), left in eval mode.
    """
    causal_lm.eval()
    device = causal_lm.get_input_embeddings().weight.device  # type: ignore[operator]
    nats = np.zeros(num_documents)
    for first in range(0, len(windows), per_device_batch):
        batch = windows[first : first + per_device_batch]
        inputs = torch.from_numpy(np.stack([window.input_ids for window in batch])).to(device)
        targets = torch.from_numpy(np.stack([window.targets for window in batch])).to(device)
        hidden = causal_lm.model(input_ids=inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        counted = targets != IGNORED
        scores = _nats(causal_lm.lm_head, hidden[counted], targets[counted])  # type: ignore[arg-type]
        owner = torch.tensor([window.document for window in batch], device=device)[:, None].expand_as(targets)[counted]
        np.add.at(nats, owner.cpu().numpy(), scores.double().cpu().numpy())
        progress(len(batch))
    return nats


def _nats(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target; hidden: (positions, hidden_size), targets: (positions,)."""
    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), t, reduction="none") for h, t in chunks])


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
