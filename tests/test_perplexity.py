import math

import numpy as np
import pytest

from pdf2lora.evaluation.intervals import bootstrap, summary
from pdf2lora.evaluation.windows import TextSize

# summary


def test_summary_by_hand():
    nats = np.array([math.log(2) * 6, math.log(2) * 12])  # 18 bits
    sizes = [TextSize(tokens=2, bytes=10, words=1), TextSize(tokens=7, bytes=26, words=2)]

    assert summary(nats, sizes) == pytest.approx(
        {"perplexity": 2 ** (18 / 9), "bits_per_byte": 18 / 36, "word_perplexity": 2 ** (18 / 3)}, rel=1e-12
    )


def test_summary_weighs_tokens_and_not_documents():
    sizes = [TextSize(tokens=1, bytes=1, words=1), TextSize(tokens=99, bytes=99, words=99)]

    assert summary(np.array([50.0, 50.0]), sizes)["perplexity"] == pytest.approx(math.e)


# bootstrap


def made_up(num_documents=40, seed=0):
    """Nats of a base and of a better model, about 3 and 2.8 a token, and the documents' sizes."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(200, 3000, num_documents)
    base = tokens * draw.normal(3, 0.3, num_documents)
    adapted = base - tokens * draw.normal(0.2, 0.05, num_documents)
    return base, adapted, [TextSize(tokens=int(n), bytes=int(4 * n), words=int(n // 2)) for n in tokens]


def test_intervals_contain_the_point_estimates():
    base, adapted, sizes = made_up()
    point = {"base": summary(base, sizes)["perplexity"], "adapted": summary(adapted, sizes)["perplexity"]}
    point["improvement"] = 1 - point["adapted"] / point["base"]

    intervals = bootstrap(base, adapted, sizes, num_samples=1000, seed=0)

    assert intervals.keys() == point.keys()
    for name, (low, high) in intervals.items():
        assert low < point[name] < high
    assert intervals["improvement"][0] > 0.1


def test_interval_is_that_of_the_resampled_documents():
    """Two documents of one token: a sample holds one of them twice, or both, with probabilities 1/4, 1/4 and 1/2."""
    sizes = [TextSize(1, 1, 1)] * 2

    intervals = bootstrap(np.array([0.0, 2.0]), np.array([0.0, 1.0]), sizes, num_samples=1000, seed=0)

    assert intervals["base"] == pytest.approx((1, math.exp(2)))
    assert intervals["adapted"] == pytest.approx((1, math.exp(1)))
    assert intervals["improvement"] == pytest.approx((0, 1 - math.exp(-1)))


def test_draws_of_documents_are_seeded():
    one, again, other = (bootstrap(*made_up(), num_samples=200, seed=seed) for seed in (1, 1, 2))

    assert one == again
    assert one != other


def test_models_are_compared_on_the_same_draws():
    base, _, sizes = made_up()
    same = bootstrap(base, base, sizes, num_samples=200, seed=0)
    tokens = np.array([size.tokens for size in sizes])
    better_by_a_tenth = bootstrap(base, base + tokens * math.log(0.9), sizes, num_samples=200, seed=0)

    assert same["improvement"] == (0, 0)
    assert same["base"] == same["adapted"]
    assert better_by_a_tenth["improvement"] == pytest.approx((0.1, 0.1), abs=1e-12)


def test_one_document_has_an_interval_of_no_width():
    base, adapted, sizes = made_up(num_documents=1)

    for low, high in bootstrap(base, adapted, sizes, num_samples=100, seed=0).values():
        assert low == high
