"""compare: the experiments of this commit -> a table of what differs in each, and whether its perplexity really does

A line for each experiment that `dvc exp show` knows. `change` is that of the adapted model's test perplexity against
the commit, with a 95% interval from a bootstrap over the test documents, paired: both are drawn on the same documents.
Where the interval holds zero, the documents do not tell the two apart.
"""

import csv
import io
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import dvc.api
import numpy as np

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import Params, read_params

DOCUMENTS = "metrics/eval_documents.csv"
NO_TERMINAL = (10_000, 24)  # nothing is cut on the way into a file
FINISHED = (None, "Success")  # a State of exp_show: None is a commit, or an experiment that ran in the workspace

Row = dict[str, Any]


@report_input_errors
def main() -> None:
    params = read_params()
    rows = dvc.api.exp_show()
    commit, experiments = rows[1], rows[2:]  # the first one is the workspace
    if not experiments:
        raise InputError("experiments: there are none of this commit; run one, such as dvc exp run -S lora.r=16")
    documents = {row["rev"]: read_documents(row) for row in (commit, *experiments)}

    names = [name for name in names_of(params) if name in commit]
    lines = [("experiment", "perplexity", "change", "[95%]", "", "what differs")]
    lines.append((f"commit {commit['rev']}", perplexity(commit), "", "", "", ""))
    for row in experiments:
        interval = change(documents[commit["rev"]], documents[row["rev"]], params.evaluate.bootstrap_samples)
        changed = [name for name in names if name in row and row[name] != commit[name]]
        differs = ", ".join(f"{name}={value(row[name])}" for name in changed)
        lines.append((row["Experiment"] or row["rev"], perplexity(row), *interval, differs or "-"))

    print(table(lines, shutil.get_terminal_size(NO_TERMINAL).columns))


def names_of(params: Params) -> list[str]:
    """Every setting as DVC names it: lora.r, compute.seq_length, ..."""
    sections = params.model_dump(exclude={"models"}).items()
    nested = [
        [f"{section}.{key}" for key in keys] if isinstance(keys, dict) else [section] for section, keys in sections
    ]
    return list(chain.from_iterable(nested))


def read_documents(row: Row) -> dict[str, tuple[float, float]]:
    """Document -> tokens, adapted perplexity; empty while an experiment waits or runs: its files are the commit's."""
    if row["State"] not in FINISHED:
        return {}
    shown = subprocess.run(["git", "show", f"{row['rev']}:{DOCUMENTS}"], capture_output=True, text=True)
    if shown.returncode != 0:
        return {}
    table = csv.DictReader(io.StringIO(shown.stdout))
    return {line["id"]: (float(line["tokens"]), float(line["adapted_perplexity"])) for line in table}


def change(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]], num_samples: int
) -> tuple[str, str, str]:
    """(change of perplexity, its interval, what they say); perplexities compare on the same tokens only."""
    if not after or not before:
        return "", "", ""
    if {name: tokens for name, (tokens, _) in before.items()} != {name: tokens for name, (tokens, _) in after.items()}:
        return "", "", "other test text"
    from pdf2lora.evaluation.intervals import (
        TextSize,  # imports torch
        bootstrap,  # imports torch
    )

    sizes = [TextSize(tokens=int(tokens), bytes=1, words=1) for tokens, _ in before.values()]
    old, new = (np.array([n * math.log(p) for n, p in (side[name] for name in before)]) for side in (before, after))
    low, high = bootstrap(old, new, sizes, num_samples=num_samples, seed=0)["improvement"]
    total = sum(size.tokens for size in sizes)
    difference = math.exp((new.sum() - old.sum()) / total) - 1
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference"
    return f"{difference:+.1%}", f"[{0 - high:+.1%}, {0 - low:+.1%}]", verdict if difference else "the same"


def perplexity(row: Row) -> str:
    found = row.get("adapted.perplexity")
    return f"{found:.2f}" if isinstance(found, float) and row["State"] in FINISHED else str(row["State"] or "-")


def value(found: Any) -> str:
    """What exp_show has of a setting, as short as can be read: 16 for 16.0, true for "True", [q v] for a list."""
    if isinstance(found, float):
        return f"{found:g}"
    if found in ("True", "False"):
        return str(found).lower()
    return str(found).replace("'", "").replace("_proj", "").replace(",", "")


def table(lines: Sequence[Sequence[str]], width: int) -> str:
    """Columns as wide as their widest field; the last is cut at the terminal's edge."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    drawn = []
    for line in lines:
        fields = [field.ljust(wide) for field, wide in zip(line, widths, strict=False)]
        text = "  ".join([*fields, line[-1]]).rstrip()
        drawn.append(text if len(text) <= width else f"{text[: width - 1]}…")
    return "\n".join(drawn)


if __name__ == "__main__":
    main()
