"""95% intervals of perplexity and of improvement. Every interval of the project is computed here.

Method: the jackknife over groups of near-duplicates (Efron and Tibshirani 1993, chapter 11) with the quantile of
Student's t. The tokens of one document depend on each other, and so do versions of one report, which split keeps
together. Groups hardly do. So the jackknife leaves out whole groups; most groups are one document. Large groups count
more than small ones. So the degrees of freedom are the effective number of groups (Kish 1965) - 1.

benchmarks/coverage.py measures how often the intervals of this method and of others contain the true value
(docs/reading-the-numbers.md has the results).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Nats = NDArray[np.float64]  # negative log-likelihood of each document, (num_documents,)
Counts = NDArray[np.int64]  # tokens of each document, (num_documents,)
Groups = Sequence[int]  # the group of near-duplicates of each document, (num_documents,)

METHOD = "jackknife over groups of near-duplicates, Student's t"
MIN_GROUPS = 3  # fewer groups give no interval
FEW_GROUPS = 8  # fewer groups give a wide interval


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    value: float
    interval: Interval | None  # 95%; None with fewer than MIN_GROUPS groups


def perplexity(nats: Nats, tokens: Counts, groups: Groups | None = None) -> Estimate:
    """exp(total nats / total tokens). Each token has the same weight; it is not a mean over batches or documents.

    The interval ends at 1, because no perplexity is lower. groups: None if no documents are near-duplicates.
    """
    mean, half_width = _mean(nats, tokens, groups)
    return Estimate(float(np.exp(mean)), _interval(lambda nll: np.exp(max(0.0, nll)), mean, half_width))


def improvement(before: Nats, after: Nats, tokens: Counts, groups: Groups | None = None) -> Estimate:
    """1 - perplexity after / perplexity before. Positive if the perplexity falls.

    The estimate is paired: it uses the difference in nats of each document, so differences between documents cancel.
    """
    mean, half_width = _mean(before - after, tokens, groups)
    return Estimate(float(-np.expm1(-mean)), _interval(lambda gain: -np.expm1(-gain), mean, half_width))


def interval_note(groups: Groups) -> str | None:
    """A warning if the groups are too few for a useful interval, else None."""
    num_documents, num_groups = len(groups), len(set(groups))
    text, unit = "1 document" if num_documents == 1 else f"{num_documents} documents", ""
    if num_groups < num_documents:
        text += f" in {num_groups} group{'s' if num_groups > 1 else ''} of near-duplicates"
        unit = " groups"
    if num_groups < MIN_GROUPS:
        return f"no interval: {text}, at least {MIN_GROUPS}{unit} are needed"
    if num_groups < FEW_GROUPS:
        return f"wide interval: only {text}"
    return None


def _mean(values: Nats, tokens: Counts, groups: Groups | None) -> tuple[float, float | None]:
    """Sum of values / sum of tokens, and half the width of its 95% interval."""
    _, places = np.unique(range(len(values)) if groups is None else groups, return_inverse=True)
    sums, sizes = (np.bincount(places, weights) for weights in (values, tokens))  # of each group
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    total, num_tokens, num_groups = sums.sum(), sizes.sum(), len(sizes)
    mean = float(total / num_tokens)
    if num_groups < MIN_GROUPS:
        return mean, None
    without_each = (total - sums) / (num_tokens - sizes)
    variance = (num_groups - 1) / num_groups * ((without_each - mean) ** 2).sum()
    effective_groups = num_tokens**2 / (sizes**2).sum()
    return mean, float(stdtrit(max(1.0, effective_groups - 1), 0.975) * np.sqrt(variance))


def _interval(transform: Callable[[float], float], mean: float, half_width: float | None) -> Interval | None:
    if half_width is None:
        return None
    return Interval(float(transform(mean - half_width)), float(transform(mean + half_width)))
