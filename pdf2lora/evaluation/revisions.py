"""Results of earlier commits and DVC experiments, read from git."""

import subprocess
from pathlib import Path

from pdf2lora.errors import InputError

DOCUMENTS = "metrics/eval_documents.csv"


def resolve_commit(name: str, project: Path) -> str:
    """The commit of a git revision or of a DVC experiment.

    Raises:
        InputError: nothing has this name, or several experiments have it.
    """
    revision = _git(project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if revision:
        return revision.strip()
    listed = _git(project, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}")
    commits = sorted(set((listed or "").split()))
    if not commits:
        raise InputError(
            f"evaluate.compare_to: '{name}' is not a git revision or an experiment; choose one from git log or "
            "dvc exp show, or 'none'"
        )
    if len(commits) > 1:
        raise InputError(f"evaluate.compare_to: several experiments are called '{name}'; give the commit of one")
    return commits[0]


def read_at(commit: str, file: str, project: Path) -> str | None:
    """The text of a file of the project in a commit; None where the commit does not have it.

    `./` makes git read the path from the project's folder, which can be a sub-folder of the git repository.
    """
    return _git(project, "show", f"{commit}:./{file}")


def read_documents_at(commit: str, project: Path) -> str:
    """metrics/eval_documents.csv of a commit.

    Raises:
        InputError: the commit does not have it.
    """
    table = read_at(commit, DOCUMENTS, project)
    if table is None:
        raise InputError(
            f"evaluate.compare_to: commit {commit[:7]} has no {DOCUMENTS}; choose a commit after evaluate, or 'none'"
        )
    return table


def _git(project: Path, *arguments: str) -> str | None:
    """The output of a git command; None where it fails."""
    process = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    return process.stdout if process.returncode == 0 else None
