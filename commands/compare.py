"""compare: the experiments of this commit -> a table with their settings and their improvement over the commit

One row for each experiment of `dvc exp show`. `improvement` is 1 - perplexity / perplexity of the commit, of the
adapted models on the test documents that both scored, with its 95% interval (evaluation/comparison.py). Experiments
that differ only in train.seed measure the seed noise. A smaller improvement has the verdict `within seed noise`.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.evaluation.comparison import Comparison, compare, parse_table
from pdf2lora.evaluation.revisions import is_evaluated, read_at
from pdf2lora.params import read_params
from pdf2lora.paths import EVAL_DOCUMENTS
from pdf2lora.runtime.arguments import require_no_arguments

NO_TERMINAL = (10_000, 24)  # columns and lines: a table that goes to a file is not cut
FINISHED = (None, "Success")  # State in exp_show; None is a commit, or an experiment that ran in the workspace

Row = dict[str, Any]  # of exp_show


@report_input_errors
def main() -> None:
    commit, *experiments = dvc.api.exp_show()[1:]  # the first row is the workspace
    if not experiments:
        raise InputError("This commit has no experiments. Run one, for example: dvc exp run -S lora.r=16")
    tables = {row["rev"]: read_table(row) for row in (commit, *experiments)}
    baseline = tables[commit["rev"]]
    names = pd.json_normalize(read_params().model_dump(exclude={"models"}))  # columns lora.r, compute.seq_length, ...
    settings = [str(name) for name in names if name in commit]
    noise = seed_noise([row for row in (commit, *experiments) if tables[row["rev"]] is not None], settings)

    rows = [("experiment", "perplexity", "improvement", "95% interval", "", "changed settings")]
    rows.append((f"commit {commit['rev']}", format_perplexity(commit, baseline), "", "", "", ""))
    for row in experiments:
        current = tables[row["rev"]]
        changed = [name for name in settings if name in row and row[name] != commit[name]]
        rows.append(
            (
                row["Experiment"] or row["rev"],
                format_perplexity(row, current),
                *improvement_cells(current, baseline, noise),
                ", ".join(f"{name}={format_setting(row[name])}" for name in changed) or "-",
            )
        )
    print(format_table(rows, shutil.get_terminal_size(NO_TERMINAL).columns))
    if noise is not None:
        print(f"seed noise: {noise:.1%} is the largest difference between runs that differ only in train.seed")


def read_table(row: Row) -> pd.DataFrame | None:
    """metrics/eval_documents.csv; None before its evaluate stage ran."""
    if row["State"] not in FINISHED or not is_evaluated(row["rev"], Path()):
        return None
    text = read_at(row["rev"], EVAL_DOCUMENTS, Path())
    return None if text is None else parse_table(text)


def seed_noise(rows: Sequence[Row], settings: Sequence[str]) -> float | None:
    """The largest relative difference in perplexity of runs that differ only in train.seed; None without such runs."""
    groups = defaultdict(list)
    for row in rows:
        others = tuple(str(row.get(name)) for name in settings if name not in ("train.seed", "evaluate.compare_to"))
        groups[others].append(row)
    differences = []
    for group in groups.values():
        seeds = {row.get("train.seed") for row in group}
        perplexities = [row["adapted.perplexity"] for row in group]
        if len(seeds) > 1:
            differences.append(max(perplexities) / min(perplexities) - 1)
    return max(differences, default=None)


def improvement_cells(
    current: pd.DataFrame | None, baseline: pd.DataFrame | None, noise: float | None = None
) -> tuple[str, str, str]:
    """Improvement, its interval, verdict."""
    if current is None or baseline is None:
        return "", "", ""
    comparison = compare(current, baseline)
    if comparison is None or comparison.num_unpaired:
        return "", "", "other test documents"
    share, interval = comparison.improvement
    cell = f"[{interval.low:+.1%}, {interval.high:+.1%}]" if interval else "none"
    return f"{share:+.1%}", cell, verdict(comparison, noise)


def verdict(comparison: Comparison, noise: float | None) -> str:
    share, interval = comparison.improvement
    if interval is None:
        return "too few documents"
    if interval == (0, 0):
        return "same"
    if noise is not None and abs(math.log1p(-share)) <= math.log1p(noise):
        return "within seed noise"
    if not comparison.significant:
        return "not significant"
    return "better" if share > 0 else "worse"


def format_perplexity(row: Row, table: pd.DataFrame | None) -> str:
    """The perplexity of an experiment, or its state if it is not evaluated."""
    if table is not None:
        return f"{row['adapted.perplexity']:.2f}"
    return "not evaluated" if row["State"] in FINISHED else str(row["State"])


def format_setting(value: Any) -> str:
    """A value of exp_show in short form: 16 for 16.0, true for "True", [q v] for ['q_proj', 'v_proj']."""
    if isinstance(value, float):
        return f"{value:g}"
    if value in ("True", "False"):
        return str(value).lower()
    return str(value).replace("'", "").replace("_proj", "").replace(",", "")


def format_table(rows: Sequence[Sequence[str]], width: int) -> str:
    """Aligned columns. A row that is longer than the terminal is cut in its last column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        fields = [field.ljust(width_) for field, width_ in zip(row, widths, strict=False)]
        line = "  ".join([*fields, row[-1]]).rstrip()
        lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
    return "\n".join(lines)


if __name__ == "__main__":
    require_no_arguments(__doc__)
    main()
