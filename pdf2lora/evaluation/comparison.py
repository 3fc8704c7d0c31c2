"""Compares the current adapter with a baseline adapter, paired by test document.

The perplexities of two documents differ far more than those of two adapters on one document. A paired comparison
removes the differences between documents.
"""

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pdf2lora.errors import InputError
from pdf2lora.evaluation.intervals import Estimate, improvement, interval_note, perplexity
from pdf2lora.evaluation.metrics import format_improvement, share_metrics
from pdf2lora.evaluation.rounding import rounded


@dataclass(frozen=True)
class Comparison:
    """Perplexities on the test documents that both runs scored."""

    groups: list[int]  # the group of near-duplicates of each document
    num_unpaired: int  # test documents of the current run that the baseline did not score
    num_improved: int  # documents with a lower perplexity than in the baseline
    baseline: float  # perplexity
    current: float
    improvement: Estimate  # 1 - current / baseline

    @property
    def num_documents(self) -> int:
        return len(self.groups)

    @property
    def significant(self) -> bool | None:
        """Whether the 95% interval does not contain 0; None without an interval."""
        interval = self.improvement.interval
        return None if interval is None else not interval.low <= 0 <= interval.high


def parse_table(text: str) -> pd.DataFrame:
    """Reads the text of metrics/eval_documents.csv."""
    return pd.read_csv(io.StringIO(text))


def compare(current: pd.DataFrame, baseline: pd.DataFrame) -> Comparison | None:
    """Compares two tables of evaluate; None if they have no common document.

    Two rows belong to the same document if id, bytes and tokens are equal. The interval shows how much the result
    depends on the choice of test documents. It does not include other training seeds, which tests/long/noise_floor.py
    measures (docs/reproducibility.md).
    """
    pairs = current.merge(
        baseline, on=["id", "bytes", "tokens"], suffixes=("_current", "_baseline"), validate="one_to_one"
    )
    if pairs.empty:
        return None
    tokens = pairs["tokens"].to_numpy(dtype=np.int64)
    column = pairs.get("group_current", pairs.get("group"))  # an older table has no groups
    groups = list(range(len(pairs))) if column is None else column.tolist()
    before, after = (tokens * np.log(pairs[f"adapted_perplexity_{run}"].to_numpy()) for run in ("baseline", "current"))
    return Comparison(
        groups=groups,
        num_unpaired=len(current) - len(pairs),
        num_improved=int((after < before).sum()),
        baseline=perplexity(before, tokens, groups).value,
        current=perplexity(after, tokens, groups).value,
        improvement=improvement(before, after, tokens, groups),
    )


def require_pairs(comparison: Comparison | None) -> Comparison:
    """Raises InputError if the two runs have no common test document."""
    if comparison is None:
        raise InputError(
            "evaluate.compare_to: the baseline scored none of the current test documents (same id, bytes and tokens). "
            "Compare runs with the same corpus, split and tokenizer, or choose 'none'."
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
        "baseline_perplexity": rounded(comparison.baseline),
        "current_perplexity": rounded(comparison.current),
        "improvement": share_metrics(comparison.improvement),
        "significant": comparison.significant,
    }


def comparison_line(name: str, commit: str, comparison: Comparison) -> str:
    if comparison.significant is None:
        verdict = interval_note(comparison.groups)
    else:
        verdict = "significant at 95%" if comparison.significant else "not significant at 95%"
    return (
        f"baseline adapter {name} ({commit[:7]}) {comparison.baseline:.2f} -> current adapter "
        f"{comparison.current:.2f}, {format_improvement(share_metrics(comparison.improvement))}, lower on "
        f"{comparison.num_improved} of {comparison.num_documents} documents; {verdict}"
    )
