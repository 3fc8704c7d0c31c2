"""Estimates of perplexity and improvement with their intervals."""

import math

import numpy as np
import pytest

from pdf2lora.evaluation.intervals import improvement, interval_note, perplexity


def random_documents(num_documents=40, seed=0):
    """Nats of a base (about 3 per token) and of a better model (about 2.8 per token), and token counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(200, 3000, num_documents)
    base = tokens * rng.normal(3, 0.3, num_documents)
    return base, base - tokens * rng.normal(0.2, 0.05, num_documents), tokens


def test_each_token_has_the_same_weight():
    assert perplexity(np.array([50.0, 50.0]), np.array([1, 99])).value == pytest.approx(math.e)


def test_improvement_compares_perplexities():
    base, adapted, tokens = random_documents()

    expected = 1 - perplexity(adapted, tokens).value / perplexity(base, tokens).value

    assert improvement(base, adapted, tokens).value == pytest.approx(expected)
    assert improvement(adapted, base, tokens).value < 0


def test_intervals_contain_the_point_estimates():
    base, adapted, tokens = random_documents()

    for value, (low, high) in (perplexity(base, tokens), improvement(base, adapted, tokens)):
        assert low < value < high
    assert improvement(base, adapted, tokens).interval.low > 0.1


def test_interval_of_documents_with_equal_lengths_is_that_of_students_t():
    nats = np.array([10.0, 12.0, 15.0, 11.0])
    tokens = np.full(4, 10)

    low, high = perplexity(nats, tokens).interval

    values = nats / 10
    half_width = 3.1824463 * values.std(ddof=1) / 2  # the quantile for 3 degrees of freedom
    assert (math.log(low), math.log(high)) == pytest.approx((values.mean() - half_width, values.mean() + half_width))


def test_the_interval_of_a_perplexity_ends_at_1():
    estimate = perplexity(np.array([10.0, 20.0, 90.0]), np.full(3, 10))

    assert estimate.interval.low == 1
    assert estimate.value == pytest.approx(math.exp(4))


def test_a_long_document_makes_the_interval_wider():
    """The other documents hardly count, so the effective number of documents is small."""
    base, adapted, tokens = random_documents(num_documents=10)
    scale = np.where(np.arange(10) == 0, 30, 1)

    equal = improvement(base, adapted, tokens).interval
    dominated = improvement(base * scale, adapted * scale, tokens * scale).interval

    assert dominated.high - dominated.low > 2 * (equal.high - equal.low)


def test_pairing_removes_the_differences_between_documents():
    base, _, tokens = random_documents()

    assert improvement(base, base, tokens).interval == (0, 0)
    assert improvement(base, base + tokens * math.log(0.9), tokens).interval == pytest.approx((0.1, 0.1))


def test_an_empty_document_changes_nothing():
    base, adapted, tokens = random_documents()
    with_empty = (np.append(values, 0) for values in (base, adapted, tokens))

    assert improvement(*with_empty) == improvement(base, adapted, tokens)


@pytest.mark.parametrize("num_documents", [1, 2])
def test_few_documents_have_no_interval(num_documents):
    base, adapted, tokens = random_documents(num_documents)

    assert perplexity(base, tokens).interval is None
    assert improvement(base, adapted, tokens).interval is None


@pytest.mark.parametrize(
    ("num_documents", "note"), [(1, "no interval: 1 document,"), (2, "no interval"), (3, "wide"), (7, "wide"), (8, "")]
)
def test_few_documents_have_a_note(num_documents, note):
    assert (interval_note(range(num_documents)) or "").startswith(note)
    assert bool(interval_note(range(num_documents))) == bool(note)


@pytest.mark.parametrize(
    ("groups", "note"),
    [
        ([0] * 8, "no interval: 8 documents in 1 group of near-duplicates, at least 3 groups are needed"),
        ([0, 0, 1, 2], "wide interval: only 4 documents in 3 groups of near-duplicates"),
        ([*range(8), 7], None),
    ],
)
def test_groups_of_near_duplicates_count_once(groups, note):
    assert interval_note(groups) == note


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_the_interval_contains_the_true_value_also_with_near_duplicates(group_size):
    """Versions of a report gain alike. Without their groups, 8 versions would count as 8 reports."""
    rng = np.random.default_rng(0)
    num_groups = 24 // group_size
    groups = np.repeat(np.arange(num_groups), group_size)
    tokens = np.full(len(groups), 5000)
    hits = ungrouped_hits = 0
    for _ in range(1000):
        gain = np.repeat(rng.normal(0.3, 0.1, num_groups), group_size) + rng.normal(0, 0.01, len(groups))
        before, after = 3.0 * tokens, (3.0 - gain) * tokens
        low, high = improvement(before, after, tokens, groups).interval
        hits += low <= 1 - math.exp(-0.3) <= high
        low, high = improvement(before, after, tokens).interval
        ungrouped_hits += low <= 1 - math.exp(-0.3) <= high

    assert 930 <= hits <= 970
    assert ungrouped_hits < 850 or group_size == 1


@pytest.mark.parametrize("num_documents", [3, 8, 30])
def test_the_interval_contains_the_true_value_in_95_percent_of_corpora(num_documents):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        tokens = np.exp(rng.normal(8, 0.6, num_documents)).astype(np.int64)
        low, high = perplexity(tokens * rng.normal(3.1, 0.33, num_documents), tokens).interval
        hits += math.log(low) <= 3.1 <= math.log(high)

    assert 930 <= hits <= 985
