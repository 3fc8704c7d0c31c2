"""The numbers of metrics/eval.json by hand."""

import math

import numpy as np
import pytest
from tiny_llama import make_document

from pdf2lora.evaluation.metrics import document_table, evaluation_metrics, summary, summary_line
from pdf2lora.evaluation.windows import TextSize
from pdf2lora.params import read_params

SIZES = [TextSize(tokens=2, bytes=10, words=1), TextSize(tokens=7, bytes=26, words=2)]
BASE = np.array([math.log(2) * 6, math.log(2) * 12])  # 18 bits
ADAPTED = BASE / 2


@pytest.fixture
def settings(write_params):
    return read_params(write_params({"evaluate.bootstrap_samples": 100})).evaluate


def test_summary():
    assert summary(BASE, SIZES) == pytest.approx(
        {"perplexity": 2 ** (18 / 9), "bits_per_byte": 18 / 36, "word_perplexity": 2 ** (18 / 3)}, rel=1e-12
    )


def test_evaluation_metrics(settings):
    metrics = evaluation_metrics(BASE, ADAPTED, SIZES, settings)

    assert metrics["base"]["perplexity"] == 4
    assert metrics["adapted"]["perplexity"] == 2
    assert metrics["improvement"]["share"] == 0.5
    assert (metrics["documents"], metrics["tokens"]) == (2, 9)
    for numbers, name in ((metrics["base"], "perplexity"), (metrics["improvement"], "share")):
        assert numbers["low_95"] <= numbers[name] <= numbers["high_95"]


def test_summary_line_has_the_metrics_of_eval_json(settings):
    line = summary_line(evaluation_metrics(BASE, ADAPTED, SIZES, settings))

    assert line.startswith("test perplexity 4.00 (base) -> 2.00 (adapted), 50.0% lower [")


def test_document_table_is_sorted_by_id():
    documents = [make_document(name, "") for name in ("b.pdf", "a.pdf")]

    table = document_table(documents, SIZES, BASE, ADAPTED)

    assert table["id"].tolist() == ["a.pdf", "b.pdf"]
    assert table["tokens"].tolist() == [7, 2]
    assert table["base_perplexity"].tolist() == pytest.approx([2 ** (12 / 7), 8], abs=1e-6)
    assert table["improvement"].tolist() == pytest.approx([1 - 2 ** (-6 / 7), 1 - 2**-1.5], abs=1e-6)
