"""The results of evaluate: metrics/eval.json, the rows of metrics/eval_documents.csv, the lines for the terminal.

Bits per byte and word perplexity divide the same nats by the bytes or words of the text instead of its tokens. They
compare models with different tokenizers (Gao et al. 2020, The Pile, section 3.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pdf2lora.evaluation.changes import COSTLY_QUANTIZATION, unsigned
from pdf2lora.evaluation.intervals import (
    METHOD,
    Counts,
    Estimate,
    Interval,
    Nats,
    improvement,
    interval_note,
    perplexity,
)
from pdf2lora.evaluation.rounding import rounded
from pdf2lora.tokens import Tokens

LARGEST_EXPONENT = 709.0  # of a float64
Metrics = dict[str, Any]


@dataclass(frozen=True)
class ScoredText:
    """The size of one text in three units, by which the metrics divide nats, and its group of near-duplicates."""

    tokens: int
    bytes: int  # UTF-8
    words: int  # separated by white space
    group: int


def scored_text(text: str, tokens: Tokens, group: int) -> ScoredText:
    """tokens: those of the text. group: texts with the same number are near-duplicates."""
    return ScoredText(tokens=len(tokens), bytes=len(text.encode()), words=len(text.split()), group=group)


@dataclass(frozen=True)
class Scores:
    """Nats of each document under each model."""

    base: Nats  # the quantized base, without the adapter
    adapted: Nats  # the quantized base with the adapter
    base_unquantized: Nats | None  # None if the base is not quantized, or its scoring is turned off

    def part(self, documents: slice) -> "Scores":
        unquantized = None if self.base_unquantized is None else self.base_unquantized[documents]
        return Scores(self.base[documents], self.adapted[documents], unquantized)


def model_metrics(nats: Nats, texts: Sequence[ScoredText]) -> Metrics:
    """Perplexity with its 95% interval, bits per byte and word perplexity of one model over all documents.

    word_perplexity is None if it is too large for a float64, as in Chinese text, which has few spaces.
    """
    total = float(nats.sum())
    nats_per_word = total / sum(text.words for text in texts)
    estimate = perplexity(nats, token_counts(texts), groups_of(texts))
    numbers = {
        "perplexity": estimate.value,
        "bits_per_byte": total / math.log(2) / sum(text.bytes for text in texts),
        "word_perplexity": math.exp(nats_per_word) if nats_per_word < LARGEST_EXPONENT else None,
    }
    metrics = {name: None if value is None else rounded(value) for name, value in numbers.items()}
    return metrics | _bounds(estimate)


def score_metrics(scores: Scores, texts: Sequence[ScoredText]) -> Metrics:
    """The metrics of each model, the improvement over each base and the cost of quantization.

    quantization_cost: perplexity of the quantized base / perplexity of the unquantized base - 1.
    """
    tokens, groups = token_counts(texts), groups_of(texts)
    metrics: Metrics = {}
    if scores.base_unquantized is not None:
        metrics["base_unquantized"] = model_metrics(scores.base_unquantized, texts)
    metrics["base"] = model_metrics(scores.base, texts)
    metrics["adapted"] = model_metrics(scores.adapted, texts)
    metrics["improvement"] = share_metrics(improvement(scores.base, scores.adapted, tokens, groups))
    if scores.base_unquantized is not None:
        over_unquantized = improvement(scores.base_unquantized, scores.adapted, tokens, groups)
        metrics["improvement_over_unquantized"] = share_metrics(over_unquantized)
        cost = negated(improvement(scores.base_unquantized, scores.base, tokens, groups))
        metrics["quantization_cost"] = share_metrics(cost)
    return metrics | {"documents": len(texts), "tokens": int(tokens.sum())}


def evaluation_metrics(
    test: Scores, test_texts: Sequence[ScoredText], general: Scores, general_texts: Sequence[ScoredText]
) -> Metrics:
    """The content of metrics/eval.json. Its section `general` has the same numbers for the general text."""
    metrics = score_metrics(test, test_texts) | {"interval": METHOD}
    if note := interval_note(groups_of(test_texts)):
        metrics["interval_note"] = note
    return metrics | {"general": score_metrics(general, general_texts)}


def document_table(ids: Sequence[str], texts: Sequence[ScoredText], scores: Scores) -> pd.DataFrame:
    """A row for each test document: its size and its perplexity under each model."""
    table = pd.DataFrame([{"id": id_, **vars(text)} for id_, text in zip(ids, texts, strict=True)])
    for name in ("base_unquantized", "base", "adapted"):
        if (nats := getattr(scores, name)) is not None:
            table[f"{name}_perplexity"] = np.exp(nats / table["tokens"]).map(rounded)
    table["improvement"] = (-np.expm1((scores.adapted - scores.base) / table["tokens"])).map(rounded)
    return table.sort_values("id")


def summary_lines(metrics: Metrics, bits: int) -> list[str]:
    """The lines that evaluate prints."""
    note = f"; {metrics['interval_note']}" if "interval_note" in metrics else ""
    base, adapted, general = metrics["base"], metrics["adapted"], metrics["general"]
    lines = [
        f"test perplexity {base['perplexity']:.2f} (base) -> {adapted['perplexity']:.2f} (adapted), "
        f"{format_improvement(metrics['improvement'])}{note}"
    ]
    if "base_unquantized" in metrics:
        cost, unquantized = metrics["quantization_cost"]["share"], metrics["base_unquantized"]["perplexity"]
        lines.append(
            f"unquantized base {unquantized:.2f}: {bits} bits cost {cost:.1%}; the adapted model is "
            f"{format_improvement(metrics['improvement_over_unquantized'])} than the unquantized base"
        )
        if cost > COSTLY_QUANTIZATION:
            remedy = "quantization.bits=8 or a larger model" if bits == 4 else "quantization.bits=16 or a larger model"
            lines.append(
                f"quantization costs more than {COSTLY_QUANTIZATION:.0%}; {remedy} reduces this cost; "
                "lora.init_lora_weights=loftq or pissa with a high lora.r corrects a part of it"
            )
    lines.append(
        f"general text {general['base']['perplexity']:.2f} (base) -> {general['adapted']['perplexity']:.2f} (adapted), "
        f"{format_improvement(general['improvement'])}"
    )
    return lines


def format_improvement(metrics: Metrics) -> str:
    """2.0% lower [1.0%, 3.0%] or 2.0% higher [1.0%, 3.0%]; without an interval only the share."""
    change = unsigned(metrics)
    text = f"{change['share']:.1%} {'lower' if metrics['share'] >= 0 else 'higher'}"
    low, high = change["low_95"], change["high_95"]
    return text if low is None else f"{text} [{low:.1%}, {high:.1%}]"


def share_metrics(estimate: Estimate) -> Metrics:
    return {"share": rounded(estimate.value), **_bounds(estimate)}


def negated(estimate: Estimate) -> Estimate:
    interval = estimate.interval
    return Estimate(-estimate.value, None if interval is None else Interval(-interval.high, -interval.low))


def token_counts(texts: Sequence[ScoredText]) -> Counts:
    return np.array([text.tokens for text in texts], dtype=np.int64)


def groups_of(texts: Sequence[ScoredText]) -> list[int]:
    return [text.group for text in texts]


def _bounds(estimate: Estimate) -> Metrics:
    """low_95 and high_95; null in JSON without an interval."""
    if estimate.interval is None:
        return {"low_95": None, "high_95": None}
    return {"low_95": rounded(estimate.interval.low), "high_95": rounded(estimate.interval.high)}
