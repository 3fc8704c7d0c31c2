"""The adapter of now against an earlier one, paired by document.

Perplexities of single documents differ far more from each other than two adapters differ on one document. So the
difference is taken within each document, and its interval over the documents: what is the same in both, how hard the
documents are, is gone from it.
"""

import io
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pdf2lora.errors import InputError

DOCUMENTS = "metrics/eval_documents.csv"


@dataclass(frozen=True)
class Comparison:
    """Perplexity over the documents that both have seen as test documents, the same tokens in both.

    improvement: 1 - now / before, its 95% interval low to high; improved: documents whose perplexity is lower now;
    left_out: test documents of now that are not compared.
    """

    documents: int
    left_out: int
    before: float
    now: float
    improvement: float
    low: float
    high: float
    improved: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


def commit_of(name: str, repository: Path) -> str:
    """The commit of a git revision or of a DVC experiment.

    Raises:
        InputError: there is none, or more than one experiment of that name.
    """
    revision = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    experiments = _git(repository, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}")
    found = [revision.strip()] if revision else sorted(set(experiments.split()) if experiments else ())
    if len(found) != 1:
        what = "names several experiments, give the commit of one" if found else "is no git revision and no experiment"
        raise InputError(f"evaluate.compare_to: '{name}' {what}; see git log and dvc exp show, or choose 'none'")
    return found[0]


def documents_at(commit: str, repository: Path) -> pd.DataFrame:
    """metrics/eval_documents.csv as it was in a commit.

    Raises:
        InputError: the commit has none.
    """
    table = _git(repository, "show", f"{commit}:{DOCUMENTS}")
    if table is None:
        raise InputError(
            f"evaluate.compare_to: commit {commit[:7]} has no {DOCUMENTS}; choose one after evaluate, or 'none'"
        )
    return pd.read_csv(io.StringIO(table))


def compare(now: pd.DataFrame, before: pd.DataFrame, *, num_samples: int, seed: int) -> Comparison:
    """Both tables as evaluate writes them. Documents are paired where id, bytes and tokens agree.

    The interval: documents are drawn with replacement, each with both of its perplexities, and the middle 95% of the
    improvements are kept (Efron and Tibshirani 1993). From a handful of documents it is too narrow; take more.
    It says nothing of other seeds: how much those differ tests/long/noise_floor.py measures (docs/reproducibility.md).

    Raises:
        InputError: they have no document in common.
    """
    keys = ["id", "bytes", "tokens"]
    both = now.merge(before, on=keys, suffixes=("_now", "_before"), validate="one_to_one")
    if both.empty:
        raise InputError(
            "evaluate.compare_to: no test document of then is one of now (same id, bytes and tokens); compare "
            "runs with the same corpus, split and tokenizer, or choose 'none'"
        )
    tokens = both["tokens"].to_numpy(dtype=np.float64)
    nats = {when: tokens * np.log(both[f"adapted_perplexity_{when}"].to_numpy()) for when in ("now", "before")}
    drawn = np.random.default_rng(seed).integers(len(both), size=(num_samples, len(both)))
    low, high = np.quantile(_improvement(nats["now"][drawn], nats["before"][drawn], tokens[drawn]), [0.025, 0.975])
    return Comparison(
        documents=len(both),
        left_out=len(now) - len(both),
        before=math.exp(nats["before"].sum() / tokens.sum()),
        now=math.exp(nats["now"].sum() / tokens.sum()),
        improvement=float(_improvement(nats["now"], nats["before"], tokens)),
        low=float(low),
        high=float(high),
        improved=int((nats["now"] < nats["before"]).sum()),
    )


def _improvement(
    now: NDArray[np.float64], before: NDArray[np.float64], tokens: NDArray[np.float64]
) -> NDArray[np.float64]:
    """1 - perplexity now / perplexity before, over the last axis."""
    return np.asarray(1 - np.exp((now - before).sum(axis=-1) / tokens.sum(axis=-1)))


def in_words(name: str, commit: str, comparison: Comparison) -> str:
    c = comparison
    direction, share = ("lower", c.improvement) if c.improvement >= 0 else ("higher", -c.improvement)
    bounds = (c.low, c.high) if c.improvement >= 0 else (-c.high, -c.low)
    verdict = "more than the choice of documents" if c.differs else "no difference that these documents show"
    return (
        f"{name} ({commit[:7]}): perplexity {c.before:.2f} -> {c.now:.2f}, {share:.1%} {direction} "
        f"[{bounds[0]:.1%}, {bounds[1]:.1%}], better on {c.improved} of {c.documents} documents: {verdict}"
    )


def _git(repository: Path, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
