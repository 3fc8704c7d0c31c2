"""The numbers of metrics/eval.json by hand, and the lines for the terminal."""

import math

import numpy as np
import pytest

from pdf2lora.evaluation.metrics import (
    ScoredText,
    Scores,
    document_table,
    evaluation_metrics,
    format_improvement,
    model_metrics,
    summary_lines,
)
from pdf2lora.evaluation.rounding import rounded

TEXTS = [ScoredText(tokens=2, bytes=10, words=1, group=0), ScoredText(tokens=7, bytes=26, words=2, group=1)]
BITS = np.array([6, 12])
BASE = math.log(2) * BITS  # 2 bits per token
SCORES = Scores(BASE, BASE / 2, BASE * 0.95)


def metrics_of(scores: Scores) -> dict:
    return evaluation_metrics(scores, TEXTS, scores, TEXTS)


def test_model_metrics():
    metrics = model_metrics(BASE, TEXTS)

    assert metrics["perplexity"] == 4
    assert metrics["bits_per_byte"] == 18 / 36
    assert metrics["word_perplexity"] == 2**6
    assert (metrics["low_95"], metrics["high_95"]) == (None, None)


def test_text_with_few_blanks_has_no_word_perplexity():
    """A page of Chinese can be one word."""
    metrics = model_metrics(np.array([400.0, 400.0]), [ScoredText(tokens=200, bytes=900, words=1, group=0)] * 2)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(400), rel=1e-5)

    metrics = model_metrics(np.array([800.0, 800.0]), [ScoredText(tokens=200, bytes=900, words=1, group=0)] * 2)
    assert metrics["word_perplexity"] is None
    assert metrics["perplexity"] == pytest.approx(math.exp(4), rel=1e-5)


def test_the_three_models_are_side_by_side():
    metrics = metrics_of(SCORES)

    assert metrics["base_unquantized"]["perplexity"] == rounded(4**0.95)
    assert (metrics["base"]["perplexity"], metrics["adapted"]["perplexity"]) == (4, 2)
    assert metrics["improvement"]["share"] == 0.5
    assert metrics["improvement_over_unquantized"]["share"] == rounded(1 - 2 / 4**0.95)
    assert metrics["quantization_cost"]["share"] == rounded(4**0.05 - 1)
    assert (metrics["documents"], metrics["tokens"]) == (2, 9)
    assert metrics["general"]["adapted"] == metrics["adapted"]


def test_without_an_unquantized_base_two_models_are_left():
    metrics = metrics_of(Scores(BASE, BASE / 2, None))

    assert not {"base_unquantized", "improvement_over_unquantized", "quantization_cost"} & set(metrics)
    assert len(summary_lines(metrics, 16)) == 2


def test_few_documents_have_a_note():
    assert metrics_of(SCORES)["interval_note"].startswith("no interval: 2 documents")
    assert "no interval: 2 documents" in summary_lines(metrics_of(SCORES), 4)[0]


@pytest.mark.parametrize(("unquantized_nats", "is_costly"), [(0.95 * BASE, True), (0.99 * BASE, False)])
def test_a_costly_quantization_is_reported(unquantized_nats, is_costly):
    lines = summary_lines(metrics_of(Scores(BASE, BASE / 2, unquantized_nats)), 4)

    assert any("costs more than 5%" in line for line in lines) == is_costly


@pytest.mark.parametrize(
    ("share", "low", "high", "text"),
    [
        (0.02, 0.01, 0.03, "2.0% lower [1.0%, 3.0%]"),
        (-0.02, -0.03, -0.01, "2.0% higher [1.0%, 3.0%]"),
        (0.02, None, None, "2.0% lower"),
    ],
)
def test_format_improvement(share, low, high, text):
    assert format_improvement({"share": share, "low_95": low, "high_95": high}) == text


def test_numbers_have_six_significant_digits():
    assert rounded(0.123456789) == 0.123457
    assert rounded(10935.889471) == 10935.9


def test_document_table_is_sorted_by_id():
    table = document_table(["b.pdf", "a.pdf"], TEXTS, SCORES)

    assert table["id"].tolist() == ["a.pdf", "b.pdf"]
    assert table["tokens"].tolist() == [7, 2]
    assert table["base_perplexity"].tolist() == [rounded(2 ** (12 / 7)), 8]
    assert table["base_unquantized_perplexity"].tolist()[1] == rounded(8**0.95)
    assert table["improvement"].tolist()[1] == rounded(1 - 2**-1.5)
