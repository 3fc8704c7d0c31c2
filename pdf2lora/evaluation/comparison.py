"""The current adapter against a baseline adapter, paired by test document.

The perplexities of two documents differ far more than those of two adapters on one document. A paired comparison
removes the differences between documents.
"""

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pdf2lora.errors import InputError
from pdf2lora.evaluation.intervals import Interval, improvement, improvement_interval, perplexity
from pdf2lora.evaluation.metrics import DIGITS


@dataclass(frozen=True)
class Comparison:
    """Perplexities over the test documents that both runs scored."""

    num_documents: int
    num_unpaired: int  # test documents of the current run that the baseline did not score
    num_improved: int  # documents with a lower perplexity than in the baseline
    baseline: float  # perplexity
    current: float
    improvement: float  # 1 - current / baseline
    interval: Interval  # 95%, of the improvement

    @property
    def significant(self) -> bool:
        """Whether the 95% interval excludes 0."""
        return not self.interval.low <= 0 <= self.interval.high


def parse_table(text: str) -> pd.DataFrame:
    """metrics/eval_documents.csv as a table."""
    return pd.read_csv(io.StringIO(text))


def compare(current: pd.DataFrame, baseline: pd.DataFrame, *, num_samples: int, seed: int) -> Comparison | None:
    """Compares two tables of evaluate; None where they share no document.

    Two documents are the same where id, bytes and tokens agree. The interval covers the choice of test documents. It
    does not cover other training seeds: tests/long/noise_floor.py measures those (docs/reproducibility.md).
    """
    pairs = current.merge(
        baseline, on=["id", "bytes", "tokens"], suffixes=("_current", "_baseline"), validate="one_to_one"
    )
    if pairs.empty:
        return None
    tokens = pairs["tokens"].to_numpy(dtype=np.int64)
    before, after = (tokens * np.log(pairs[f"adapted_perplexity_{run}"].to_numpy()) for run in ("baseline", "current"))
    return Comparison(
        num_documents=len(pairs),
        num_unpaired=len(current) - len(pairs),
        num_improved=int((after < before).sum()),
        baseline=perplexity(before, tokens),
        current=perplexity(after, tokens),
        improvement=improvement(before, after, tokens),
        interval=improvement_interval(before, after, tokens, num_samples=num_samples, seed=seed),
    )


def require_pairs(comparison: Comparison | None) -> Comparison:
    """
    Raises:
        InputError: the two runs share no test document.
    """
    if comparison is None:
        raise InputError(
            "evaluate.compare_to: the baseline scored none of the current test documents (same id, bytes and tokens); "
            "compare runs with the same corpus, split and tokenizer, or choose 'none'"
        )
    return comparison


def comparison_metrics(name: str, commit: str, comparison: Comparison) -> dict[str, object]:
    """The section `comparison` of metrics/eval.json."""
    return {
        "baseline": name,
        "commit": commit,
        "documents": comparison.num_documents,
        "unpaired_documents": comparison.num_unpaired,
        "improved_documents": comparison.num_improved,
        "baseline_perplexity": round(comparison.baseline, DIGITS),
        "current_perplexity": round(comparison.current, DIGITS),
        "improvement": {
            "share": round(comparison.improvement, DIGITS),
            "low_95": round(comparison.interval.low, DIGITS),
            "high_95": round(comparison.interval.high, DIGITS),
        },
        "significant": comparison.significant,
    }


def comparison_line(name: str, commit: str, comparison: Comparison) -> str:
    low, high = comparison.interval
    verdict = "significant at 95%" if comparison.significant else "not significant at 95%"
    return (
        f"baseline adapter {name} ({commit[:7]}) {comparison.baseline:.2f} -> current adapter "
        f"{comparison.current:.2f}, {comparison.improvement:.1%} lower [{low:.1%}, {high:.1%}], lower on "
        f"{comparison.num_improved} of {comparison.num_documents} documents; {verdict}"
    )
