"""The paired comparison of two adapters."""

import math

import numpy as np
import pandas as pd
import pytest

from pdf2lora.errors import InputError
from pdf2lora.evaluation.comparison import Comparison, compare, comparison_line, comparison_metrics, require_pairs
from pdf2lora.evaluation.intervals import Estimate, Interval


def bounds(comparison: Comparison) -> Interval:
    assert comparison.improvement.interval is not None
    return comparison.improvement.interval


def paired(current: pd.DataFrame, baseline: pd.DataFrame) -> Comparison:
    return require_pairs(compare(current, baseline))


def table(perplexities: list[float], tokens: list[int] | None = None, first: int = 0) -> pd.DataFrame:
    """metrics/eval_documents.csv of documents with one byte per token."""
    counts = tokens or [100] * len(perplexities)
    ids = [f"{first + number}.pdf" for number in range(len(perplexities))]
    return pd.DataFrame({"id": ids, "bytes": counts, "tokens": counts, "adapted_perplexity": perplexities})


def test_perplexities_are_over_all_tokens() -> None:
    compared = paired(table([10.0, 40.0], [300, 100]), table([20.0, 50.0], [300, 100]))

    assert compared.current == pytest.approx(math.exp((300 * math.log(10) + 100 * math.log(40)) / 400))
    assert compared.baseline == pytest.approx(math.exp((300 * math.log(20) + 100 * math.log(50)) / 400))
    assert compared.improvement.value == pytest.approx(1 - compared.current / compared.baseline)
    assert (compared.num_documents, compared.num_unpaired, compared.num_improved) == (2, 0, 2)


def test_pairing_finds_a_small_difference_between_adapters() -> None:
    """The perplexities of the documents are between 5 and 500. The adapters differ by one percent."""
    rng = np.random.default_rng(0)
    baseline = np.exp(rng.uniform(math.log(5), math.log(500), size=40))
    current = baseline * 0.99 * np.exp(rng.normal(0, 0.01, size=40))

    compared = paired(table(list(current)), table(list(baseline)))

    assert compared.significant
    assert 0 < bounds(compared).low < 0.01 < bounds(compared).high < 0.02
    unpaired = [np.log(values)[rng.integers(40, size=(2000, 40))].mean(axis=1) for values in (current, baseline)]
    low, high = np.quantile(1 - np.exp(unpaired[0] - unpaired[1]), [0.025, 0.975])
    assert low < 0 < high


@pytest.mark.parametrize("baseline_has_groups", [True, False])
def test_near_duplicates_count_once(baseline_has_groups: bool) -> None:
    """The table of an older run has no groups."""
    baseline, current = table([20.0] * 6), table([19.0, 19.0, 19.0, 19.0, 21.0, 18.0])
    ungrouped = paired(current, baseline)
    current["group"] = [0, 0, 0, 0, 1, 2]
    if baseline_has_groups:
        baseline["group"] = [5, 5, 5, 5, 6, 7]

    compared = paired(current, baseline)

    assert compared.improvement.value == pytest.approx(ungrouped.improvement.value)
    assert bounds(compared).low < bounds(ungrouped).low


def test_noise_is_not_significant() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.uniform(20, 30, size=30)

    compared = paired(table(list(baseline * np.exp(rng.normal(0, 0.02, size=30)))), table(list(baseline)))

    assert not compared.significant
    assert bounds(compared).low < 0 < bounds(compared).high


@pytest.mark.parametrize("effect", [0.0, 0.02])
def test_the_interval_covers_the_truth_in_about_95_percent_of_samples(effect: float) -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        baseline = rng.uniform(20, 30, size=50)
        current = baseline * (1 - effect) * np.exp(rng.normal(0, 0.03, size=50))
        compared = paired(table(list(current)), table(list(baseline)))
        hits += bounds(compared).low <= effect <= bounds(compared).high
    assert 0.88 <= hits / 200 <= 0.99


def test_an_adapter_does_not_differ_from_itself() -> None:
    current = table([3.0, 7.0, 12.0])

    compared = paired(current, current.copy())

    assert (compared.improvement, compared.num_improved) == ((0, (0, 0)), 0)
    assert not compared.significant


def test_only_common_documents_are_compared() -> None:
    compared = paired(table([10.0, 20.0, 30.0], first=1), table([11.0, 11.0, 21.0], first=0))

    assert (compared.num_documents, compared.num_unpaired) == (2, 1)
    assert compared.current == pytest.approx(math.sqrt(10 * 20))


def test_a_document_with_another_number_of_tokens_is_another_document() -> None:
    comparison = compare(table([10.0], [100]), table([10.0], [90]))

    assert comparison is None
    with pytest.raises(InputError, match=r"evaluate\.compare_to: the baseline scored none of the current"):
        require_pairs(comparison)


@pytest.mark.parametrize(
    ("improvement", "low", "high", "words"),
    [
        (0.02, 0.01, 0.03, "2.0% lower [1.0%, 3.0%], lower on 3 of 4 documents; significant at 95%"),
        (-0.02, -0.03, -0.01, "2.0% higher [1.0%, 3.0%], lower on 3 of 4 documents; significant at 95%"),
        (0.002, -0.01, 0.01, "0.2% lower [-1.0%, 1.0%], lower on 3 of 4 documents; not significant at 95%"),
    ],
)
def test_the_line_for_the_terminal(improvement: float, low: float, high: float, words: str) -> None:
    comparison = Comparison([0, 1, 2, 3], 0, 3, 50.0, 49.0, Estimate(improvement, Interval(low, high)))

    line = comparison_line("main", "0123456789", comparison)

    assert line == f"baseline adapter main (0123456) 50.00 -> current adapter 49.00, {words}"


def test_metrics_have_the_sign_of_the_improvement() -> None:
    metrics = comparison_metrics("main", "0123456789", paired(table([9.0, 8.0]), table([10.0, 10.0])))

    assert metrics["baseline"] == "main"
    assert metrics["improvement"]["share"] > 0  # type: ignore[index]
    assert metrics["current_perplexity"] < metrics["baseline_perplexity"]  # type: ignore[operator]


@pytest.mark.parametrize("num_documents", [1, 2])
def test_few_documents_give_no_verdict(num_documents: int) -> None:
    comparison = paired(table([9.0] * num_documents), table([10.0] * num_documents))

    assert comparison.significant is None
    assert comparison_metrics("main", "0123456789", comparison)["significant"] is None
    assert "no interval" in comparison_line("main", "0123456789", comparison)
