"""95% intervals of perplexity and of improvement. Every interval of the project is computed here.

Method: the jackknife over documents (Efron and Tibshirani 1993, chapter 11) with the quantile of Student's t. The
tokens of one document depend on each other, but documents hardly do. So the jackknife leaves out whole documents. Long
documents count more than short ones, so the degrees of freedom are the effective number of documents (Kish 1965) - 1.

benchmarks/coverage.py measures how often the intervals of this method and of others contain the true value
(docs/reading-the-numbers.md has the results).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Nats = NDArray[np.float64]  # negative log-likelihood of each document, (num_documents,)
Counts = NDArray[np.int64]  # tokens of each document, (num_documents,)

METHOD = "jackknife over documents, Student's t"
MIN_DOCUMENTS = 3  # fewer documents give no interval
FEW_DOCUMENTS = 8  # fewer documents give a wide interval


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    value: float
    interval: Interval | None  # 95%; None with fewer than MIN_DOCUMENTS documents


def perplexity(nats: Nats, tokens: Counts) -> Estimate:
    """exp(total nats / total tokens). Each token has the same weight; it is not a mean over batches or documents.

    The interval ends at 1, because no perplexity is lower.
    """
    mean, half_width = _mean(nats, tokens)
    return Estimate(float(np.exp(mean)), _interval(lambda nll: np.exp(max(0.0, nll)), mean, half_width))


def improvement(before: Nats, after: Nats, tokens: Counts) -> Estimate:
    """1 - perplexity after / perplexity before. Positive if the perplexity falls.

    The estimate is paired: it uses the difference in nats of each document, so differences between documents cancel.
    """
    mean, half_width = _mean(before - after, tokens)
    return Estimate(float(-np.expm1(-mean)), _interval(lambda gain: -np.expm1(-gain), mean, half_width))


def interval_note(num_documents: int) -> str | None:
    """A warning if the documents are too few for a useful interval, else None."""
    documents = "1 document" if num_documents == 1 else f"{num_documents} documents"
    if num_documents < MIN_DOCUMENTS:
        return f"no interval: {documents}, at least {MIN_DOCUMENTS} are needed"
    if num_documents < FEW_DOCUMENTS:
        return f"wide interval: only {documents}"
    return None


def _mean(values: Nats, tokens: Counts) -> tuple[float, float | None]:
    """Sum of values / sum of tokens, and half the width of its 95% interval."""
    values, tokens = values[tokens > 0], tokens[tokens > 0]
    total, num_tokens, num_documents = values.sum(), tokens.sum(), len(tokens)
    mean = float(total / num_tokens)
    if num_documents < MIN_DOCUMENTS:
        return mean, None
    without_each = (total - values) / (num_tokens - tokens)
    variance = (num_documents - 1) / num_documents * ((without_each - mean) ** 2).sum()
    effective_documents = num_tokens**2 / (tokens.astype(np.float64) ** 2).sum()
    return mean, float(stdtrit(max(1.0, effective_documents - 1), 0.975) * np.sqrt(variance))


def _interval(transform: Callable[[float], float], mean: float, half_width: float | None) -> Interval | None:
    if half_width is None:
        return None
    return Interval(float(transform(mean - half_width)), float(transform(mean + half_width)))
