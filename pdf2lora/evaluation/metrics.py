"""The results of evaluate: metrics/eval.json, the rows of metrics/eval_documents.csv, the line for the terminal.

Bits per byte and word perplexity divide the same nats by the size of the text instead of the number of tokens. They
compare models with different tokenizers (Gao et al. 2020, The Pile, section 3.1).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pdf2lora.documents.records import Document
from pdf2lora.evaluation.intervals import (
    Counts,
    Interval,
    Nats,
    improvement,
    improvement_interval,
    perplexity,
    perplexity_interval,
)
from pdf2lora.evaluation.windows import TextSize
from pdf2lora.params import Evaluate

DIGITS = 6  # after the decimal point: further digits depend on the processor


def summary(nats: Nats, sizes: Sequence[TextSize]) -> dict[str, float]:
    """Perplexity, bits per byte and word perplexity of one model over all documents."""
    total = float(nats.sum())
    return {
        "perplexity": perplexity(nats, token_counts(sizes)),
        "bits_per_byte": total / math.log(2) / sum(size.bytes for size in sizes),
        "word_perplexity": math.exp(total / sum(size.words for size in sizes)),
    }


def model_metrics(nats: Nats, sizes: Sequence[TextSize], settings: Evaluate) -> dict[str, float]:
    """`summary` with the 95% interval of the perplexity."""
    interval = perplexity_interval(
        nats, token_counts(sizes), num_samples=settings.bootstrap_samples, seed=settings.seed
    )
    return _rounded(summary(nats, sizes)) | _bounds(interval)


def evaluation_metrics(base: Nats, adapted: Nats, sizes: Sequence[TextSize], settings: Evaluate) -> dict[str, Any]:
    """The content of metrics/eval.json."""
    tokens = token_counts(sizes)
    interval = improvement_interval(base, adapted, tokens, num_samples=settings.bootstrap_samples, seed=settings.seed)
    return {
        "base": model_metrics(base, sizes, settings),
        "adapted": model_metrics(adapted, sizes, settings),
        "improvement": {"share": round(improvement(base, adapted, tokens), DIGITS), **_bounds(interval)},
        "documents": len(sizes),
        "tokens": int(tokens.sum()),
    }


def document_table(documents: Sequence[Document], sizes: Sequence[TextSize], base: Nats, adapted: Nats) -> pd.DataFrame:
    """A row for each test document: its size and its perplexity under both models."""
    table = pd.DataFrame([{"id": document.id, **vars(size)} for document, size in zip(documents, sizes, strict=True)])
    for name, nats in (("base", base), ("adapted", adapted)):
        table[f"{name}_perplexity"] = np.exp(nats / table["tokens"]).round(DIGITS)
    table["improvement"] = (1 - table["adapted_perplexity"] / table["base_perplexity"]).round(DIGITS)
    return table.sort_values("id")


def summary_line(metrics: dict[str, Any]) -> str:
    base, adapted, gain = metrics["base"], metrics["adapted"], metrics["improvement"]
    return (
        f"test perplexity {base['perplexity']:.2f} (base) -> {adapted['perplexity']:.2f} (adapted), "
        f"{gain['share']:.1%} lower [{gain['low_95']:.1%}, {gain['high_95']:.1%}]"
    )


def token_counts(sizes: Sequence[TextSize]) -> Counts:
    return np.array([size.tokens for size in sizes], dtype=np.int64)


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in numbers.items()}


def _bounds(interval: Interval) -> dict[str, float]:
    return _rounded({"low_95": interval.low, "high_95": interval.high})
