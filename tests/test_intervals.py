"""Intervals of perplexity and improvement: point estimates, pairing, seed."""

import math

import numpy as np
import pytest

from pdf2lora.evaluation.intervals import (
    improvement,
    improvement_interval,
    perplexity,
    perplexity_interval,
)

SETTINGS = {"num_samples": 1000, "seed": 0}


def random_documents(num_documents=40, seed=0):
    """Nats of a base (about 3 a token) and of a better model (about 2.8), and token counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(200, 3000, num_documents)
    base = tokens * rng.normal(3, 0.3, num_documents)
    return base, base - tokens * rng.normal(0.2, 0.05, num_documents), tokens


def test_each_token_has_the_same_weight():
    assert perplexity(np.array([50.0, 50.0]), np.array([1, 99])) == pytest.approx(math.e)


def test_improvement_compares_perplexities():
    base, adapted, tokens = random_documents()

    expected = 1 - perplexity(adapted, tokens) / perplexity(base, tokens)

    assert improvement(base, adapted, tokens) == pytest.approx(expected)
    assert improvement(adapted, base, tokens) < 0


def test_intervals_contain_the_point_estimates():
    base, adapted, tokens = random_documents()

    for nats in (base, adapted):
        low, high = perplexity_interval(nats, tokens, **SETTINGS)
        assert low < perplexity(nats, tokens) < high
    low, high = improvement_interval(base, adapted, tokens, **SETTINGS)
    assert 0.1 < low < improvement(base, adapted, tokens) < high


def test_documents_are_resampled():
    """Of two documents with one token, a resample has one document twice or both."""
    tokens = np.array([1, 1])

    base, adapted = np.array([0.0, 2.0]), np.array([0.0, 1.0])

    assert perplexity_interval(base, tokens, **SETTINGS) == pytest.approx((1, math.exp(2)))
    assert improvement_interval(base, adapted, tokens, **SETTINGS) == pytest.approx((0, 1 - math.exp(-1)))


def test_the_seed_decides_the_resamples():
    first, repeated, other = (
        improvement_interval(*random_documents(), num_samples=200, seed=seed) for seed in (1, 1, 2)
    )

    assert first == repeated
    assert first != other


def test_pairing_removes_the_differences_between_documents():
    base, _, tokens = random_documents()
    better_by_a_tenth = base + tokens * math.log(0.9)

    assert improvement_interval(base, base, tokens, **SETTINGS) == (0, 0)
    assert improvement_interval(base, better_by_a_tenth, tokens, **SETTINGS) == pytest.approx((0.1, 0.1), abs=1e-12)
