"""compare: the experiments of this commit -> a table with their settings and their improvement over the commit

One row for each experiment of `dvc exp show`. `improvement` is 1 - perplexity / perplexity of the commit, of the
adapted models on the test documents that both scored, with its 95% interval (evaluation/comparison.py).
"""

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.evaluation.comparison import Comparison, compare, parse_table
from pdf2lora.evaluation.revisions import DOCUMENTS, read_at
from pdf2lora.params import Params, read_params

NO_TERMINAL = (10_000, 24)  # columns and lines: a table that goes to a file is not cut
FINISHED = (None, "Success")  # State in exp_show; None is a commit, or an experiment that ran in the workspace

Row = dict[str, Any]  # of exp_show


@report_input_errors
def main() -> None:
    params = read_params()
    commit, *experiments = dvc.api.exp_show()[1:]  # the first row is the workspace
    if not experiments:
        raise InputError("This commit has no experiments. Run one, for example: dvc exp run -S lora.r=16")
    baseline = read_table(commit)
    settings = [name for name in setting_names(params) if name in commit]

    rows = [("experiment", "perplexity", "improvement", "95% interval", "", "changed settings")]
    rows.append((f"commit {commit['rev']}", format_perplexity(commit), "", "", "", ""))
    for row in experiments:
        changes = [
            f"{name}={format_setting(row[name])}" for name in settings if name in row and row[name] != commit[name]
        ]
        rows.append(
            (
                row["Experiment"] or row["rev"],
                format_perplexity(row),
                *improvement_cells(read_table(row), baseline, params),
                ", ".join(changes) or "-",
            )
        )
    print(format_table(rows, shutil.get_terminal_size(NO_TERMINAL).columns))


def setting_names(params: Params) -> list[str]:
    """Every setting as DVC names it: lora.r, compute.seq_length, ..."""
    sections = params.model_dump(exclude={"models"}).items()
    nested = [
        [f"{section}.{key}" for key in keys] if isinstance(keys, dict) else [section] for section, keys in sections
    ]
    return list(chain.from_iterable(nested))


def read_table(row: Row) -> pd.DataFrame | None:
    """metrics/eval_documents.csv of a finished experiment. The file of an unfinished one is that of the commit."""
    text = read_at(row["rev"], DOCUMENTS, Path()) if row["State"] in FINISHED else None
    return None if text is None else parse_table(text)


def improvement_cells(
    current: pd.DataFrame | None, baseline: pd.DataFrame | None, params: Params
) -> tuple[str, str, str]:
    """Improvement, its interval, verdict."""
    if current is None or baseline is None:
        return "", "", ""
    settings = params.evaluate
    comparison = compare(current, baseline, num_samples=settings.bootstrap_samples, seed=settings.seed)
    if comparison is None or comparison.num_unpaired:
        return "", "", "other test documents"
    low, high = comparison.interval
    return f"{comparison.improvement:+.1%}", f"[{low:+.1%}, {high:+.1%}]", verdict(comparison)


def verdict(comparison: Comparison) -> str:
    if not comparison.significant:
        return "same" if comparison.interval == (0, 0) else "not significant"
    return "better" if comparison.improvement > 0 else "worse"


def format_perplexity(row: Row) -> str:
    """The perplexity of a finished experiment, the state of another one."""
    perplexity = row.get("adapted.perplexity")
    finished = isinstance(perplexity, float) and row["State"] in FINISHED
    return f"{perplexity:.2f}" if finished else str(row["State"] or "-")


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
    main()
