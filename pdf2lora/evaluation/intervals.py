"""95% intervals of perplexity and of improvement. Every interval of the project is computed here.

A percentile bootstrap over documents (Efron and Tibshirani 1993): it resamples whole documents with replacement. The
tokens of one document depend on each other; documents hardly do. The same seed resamples the same documents, so two
models are compared on the same resamples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Nats = NDArray[np.float64]  # negative log-likelihood of each document, (num_documents,)
Counts = NDArray[np.int64]  # tokens of each document, (num_documents,)


class Interval(NamedTuple):
    low: float
    high: float


def perplexity(nats: Nats, tokens: Counts) -> float:
    """exp(total nats / total tokens). It is not a mean over batches or documents: each token has the same weight."""
    return float(np.exp(nats.sum() / tokens.sum()))


def improvement(before: Nats, after: Nats, tokens: Counts) -> float:
    """1 - perplexity after / perplexity before. It is positive where perplexity falls."""
    return float(1 - np.exp((after - before).sum() / tokens.sum()))


def perplexity_interval(nats: Nats, tokens: Counts, *, num_samples: int, seed: int) -> Interval:
    """The 95% interval of `perplexity`."""
    documents = _resampled_documents(len(tokens), num_samples=num_samples, seed=seed)
    return _middle_95_percent(np.exp(nats[documents].sum(axis=1) / tokens[documents].sum(axis=1)))


def improvement_interval(before: Nats, after: Nats, tokens: Counts, *, num_samples: int, seed: int) -> Interval:
    """The 95% interval of `improvement`, paired: each resampled document has its nats under both models."""
    documents = _resampled_documents(len(tokens), num_samples=num_samples, seed=seed)
    return _middle_95_percent(1 - np.exp((after - before)[documents].sum(axis=1) / tokens[documents].sum(axis=1)))


def _resampled_documents(num_documents: int, *, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Indices of documents, (num_samples, num_documents), drawn with replacement."""
    return np.random.default_rng(seed).integers(num_documents, size=(num_samples, num_documents))


def _middle_95_percent(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))
