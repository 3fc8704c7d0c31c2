"""Measures how often a 95% interval contains the true value, by method and number of test documents.

    python -m benchmarks.coverage [<samples>]

Takes minutes on one core. Draws corpora from three populations of documents with a known perplexity and improvement:

- normal: token counts log-normal with sd 0.6; nats per token 3.1 with sd 0.33; gain 0.38 with sd 0.08.
- skewed: token counts log-normal with sd 1; nats per token gamma-distributed; the gain is a share of them.
- dependent: long documents have fewer nats per token and a larger gain.

Methods: `ours` (pdf2lora/evaluation/intervals.py); the percentile, BCa and studentized bootstraps over documents; the
percentile bootstrap over documents and over windows within them; Student's t with the delta method.
"""

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from pdf2lora.evaluation import intervals

Array = NDArray[np.float64]
Method = Callable[[Array, Array, np.random.Generator], tuple[float, float]]

NUM_DOCUMENTS = (1, 2, 3, 4, 6, 8, 16, 50)
NUM_SAMPLES = 1000  # corpora of each size
NUM_RESAMPLES = 1000
WINDOW = 256  # tokens
WINDOW_SPREAD = 1.2  # sd between the windows of one document / sd between documents
MEDIAN_TOKENS = 4000  # of a document


def main() -> None:
    num_samples = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SAMPLES
    for name, population in POPULATIONS.items():
        print(f"{name}\n| documents | value | " + " | ".join(METHODS) + " |\n|---|---|" + "---|" * len(METHODS))
        for num_documents in NUM_DOCUMENTS:
            print_row(population, num_documents, num_samples)


def print_row(population: Callable[..., tuple[Array, ...]], num_documents: int, num_samples: int) -> None:
    rng = np.random.default_rng(num_documents)
    hits = np.zeros((2, len(METHODS)))
    for _ in range(num_samples):
        tokens, perplexity, gain = population(num_documents, rng)
        for row, (values, truth) in enumerate(((perplexity[1:], perplexity[0]), (gain[1:], gain[0]))):
            for column, method in enumerate(METHODS.values()):
                low, high = method(values, tokens, rng)
                hits[row, column] += low <= truth <= high
    for name, shares in zip(("perplexity", "improvement"), hits / num_samples, strict=True):
        cells = [
            f"{share:.0%}" if num_documents >= intervals.MIN_GROUPS or i else "none" for i, share in enumerate(shares)
        ]
        print(f"| {num_documents} | {name} | " + " | ".join(cells) + " |", flush=True)


# Populations: tokens of each document; true mean and values, in nats per token, of perplexity and of the gain


def normal(num_documents: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    tokens = MEDIAN_TOKENS * np.exp(rng.normal(0, 0.6, num_documents))
    nats, gain = rng.normal(3.1, 0.33, num_documents), rng.normal(0.38, 0.08, num_documents)
    return tokens, np.r_[3.1, nats], np.r_[0.38, gain]


def skewed(num_documents: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    tokens = MEDIAN_TOKENS * np.exp(rng.normal(0, 1, num_documents))
    nats = 2 + rng.gamma(4, 0.25, num_documents)
    return tokens, np.r_[3.0, nats], np.r_[0.36, rng.normal(0.12, 0.05, num_documents) * nats]


def dependent(num_documents: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    length = rng.normal(0, 1, num_documents)
    tokens = MEDIAN_TOKENS * np.exp(0.8 * length)  # E[length * tokens] / E[tokens] = 0.8
    nats = 3.1 - 0.15 * length + rng.normal(0, 0.3, num_documents)
    gain = 0.38 + 0.03 * length + rng.normal(0, 0.08, num_documents)
    return tokens, np.r_[3.1 - 0.15 * 0.8, nats], np.r_[0.38 + 0.03 * 0.8, gain]


POPULATIONS = {"normal": normal, "skewed": skewed, "dependent": dependent}


# Methods: nats per token and tokens of each document -> bounds of the mean over tokens


def ours(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    interval = intervals.perplexity(values * tokens, tokens).interval  # type: ignore[arg-type]
    return (np.nan, np.nan) if interval is None else (np.log(interval.low), np.log(interval.high))


def t_delta(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    mean, error = _mean_and_error(values, tokens)
    half_width = stdtrit(max(1, len(tokens) - 1), 0.975) * error
    return float(mean - half_width), float(mean + half_width)


def percentile(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    return _quantiles(_mean_and_error(*_resample(values, tokens, rng))[0])


def two_stage(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Resamples documents, and windows within each of them."""
    window_sd = WINDOW_SPREAD * np.std(values)
    values, tokens = _resample(values, tokens, rng)
    noise = window_sd * rng.normal(0, 1, values.shape) / np.sqrt(np.maximum(1, tokens / WINDOW))
    return _quantiles(_mean_and_error(values + noise, tokens)[0])


def studentized(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    mean, error = _mean_and_error(values, tokens)
    means, errors = _mean_and_error(*_resample(values, tokens, rng))
    with np.errstate(invalid="ignore", divide="ignore"):
        statistics = (means - mean) / errors
    statistics = statistics[np.isfinite(statistics)]
    if len(statistics) == 0:
        return float(mean), float(mean)
    low, high = _quantiles(statistics)
    return float(mean - high * error), float(mean - low * error)


def bca(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Bias-corrected and accelerated (Efron 1987)."""
    mean, _ = _mean_and_error(values, tokens)
    means, _ = _mean_and_error(*_resample(values, tokens, rng))
    if len(tokens) == 1:
        return float(mean), float(mean)
    without_each = ((values * tokens).sum() - values * tokens) / (tokens.sum() - tokens)
    deviations = without_each.mean() - without_each
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    below = np.clip((means < mean).mean() + 0.5 * (means == mean).mean(), 0.001, 0.999)
    bias = ndtri(below)
    z = bias + ndtri([0.025, 0.975])
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


METHODS: dict[str, Method] = {
    "ours": ours,
    "percentile": percentile,
    "documents, then windows": two_stage,
    "BCa": bca,
    "studentized": studentized,
    "t, delta method": t_delta,
}


def _resample(values: Array, tokens: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Documents drawn with replacement, (NUM_RESAMPLES, num_documents)."""
    documents = rng.integers(len(tokens), size=(NUM_RESAMPLES, len(tokens)))
    return values[documents], tokens[documents]


def _mean_and_error(values: Array, tokens: Array) -> tuple[Array, Array]:
    """Mean over tokens and its standard error by the delta method, over the last axis."""
    total = tokens.sum(axis=-1, keepdims=True)
    mean = (values * tokens).sum(axis=-1, keepdims=True) / total
    correction = tokens.shape[-1] / max(1, tokens.shape[-1] - 1)
    variance = correction * ((tokens * (values - mean)) ** 2).sum(axis=-1) / total[..., 0] ** 2
    return mean[..., 0], np.sqrt(variance)


def _quantiles(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
