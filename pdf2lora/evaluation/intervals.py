"""Perplexity = exp(summed nats / counted tokens): each token of the test documents is scored once.

Not the mean over batches of each batch's mean loss, which weighs the tokens of a short batch more. Bits per byte and
word perplexity count the same nats against the text instead of its tokens, and so compare across tokenizers (Gao et
al. 2020, The Pile, section 3.1).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdf2lora.evaluation.windows import TextSize

Nats = NDArray[np.float64]
DIGITS = 6  # after the point: more would be noise of the processor's arithmetic


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


def result(base: Nats, adapted: Nats, sizes: list[TextSize], *, num_samples: int, seed: int) -> dict[str, object]:
    """The tree of metrics/eval.json: base, adapted, improvement, what was counted."""
    intervals = bootstrap(base, adapted, sizes, num_samples=num_samples, seed=seed)
    models = {"base": summary(base, sizes), "adapted": summary(adapted, sizes)}

    def low_and_high(name: str) -> dict[str, float]:
        low, high = intervals[name]
        return {"low_95": round(low, DIGITS), "high_95": round(high, DIGITS)}

    tree: dict[str, object] = {
        name: {key: round(value, DIGITS) for key, value in numbers.items()} | low_and_high(name)
        for name, numbers in models.items()
    }
    improvement = 1 - models["adapted"]["perplexity"] / models["base"]["perplexity"]
    return tree | {
        "improvement": {"share": round(improvement, DIGITS), **low_and_high("improvement")},
        "documents": len(sizes),
        "tokens": sum(size.tokens for size in sizes),
    }
