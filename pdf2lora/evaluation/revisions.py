"""Results of earlier commits and DVC experiments, read from git."""

import json
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.errors import InputError
from pdf2lora.paths import EVAL_DOCUMENTS

CACHE = ".dvc/cache/files/md5"

Entry = dict[str, Any]  # of dvc.lock: path, md5, ...


def resolve_commit(name: str, project: Path) -> str:
    """The commit of a git revision or of a DVC experiment.

    Raises InputError if the name does not exist, or several experiments have it.
    """
    revision = _git(project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if revision:
        return revision.strip()
    listed = _git(project, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}")
    commits = sorted(set((listed or "").split()))
    if not commits:
        raise InputError(
            f"evaluate.compare_to: '{name}' is not a git revision or an experiment. Choose one from git log or "
            "dvc exp show, or 'none'."
        )
    if len(commits) > 1:
        raise InputError(f"evaluate.compare_to: several experiments have the name '{name}'. Use the commit of one.")
    return commits[0]


def read_at(commit: str, file: str | Path, project: Path) -> str | None:
    """The text of a file of the project in a commit; None if the commit does not have it.

    `./` makes git read the path from the project's folder, which can be a sub-folder of the git repository.
    """
    return _git(project, "show", f"{commit}:./{file}")


def read_documents_at(commit: str, project: Path) -> str:
    """metrics/eval_documents.csv of a commit.

    Raises InputError if the commit does not have it, or evaluate did not run on its adapter and test documents.
    """
    table = read_at(commit, EVAL_DOCUMENTS, project)
    if table is None or not is_evaluated(commit, project):
        raise InputError(
            f"evaluate.compare_to: commit {commit[:7]} is not evaluated. Choose a commit after evaluate, or 'none'."
        )
    return table


def is_evaluated(commit: str, project: Path) -> bool:
    """Whether evaluate ran on the outputs of the earlier stages that the dvc.lock of the commit has.

    An experiment that stops before evaluate (`dvc exp run train`) has the metrics of its parent commit.
    """
    text = read_at(commit, "dvc.lock", project)
    if text is None:
        return True  # the metrics do not come from dvc
    stages = YAML(typ="safe", pure=True).load(text)["stages"]
    outputs = [entry for stage in stages.values() for entry in stage.get("outs", ())]
    inputs = stages.get("evaluate", {}).get("deps", ())
    return bool(inputs) and all(_is_current(entry, outputs, project / CACHE) for entry in inputs)


def _is_current(entry: Entry, outputs: list[Entry], cache: Path) -> bool:
    """Whether a dependency has the hash that it has as an output, or as a file of an output folder."""
    for output in outputs:
        if output["path"] == entry["path"]:
            return bool(output["md5"] == entry["md5"])
        if entry["path"].startswith(f"{output['path']}/"):
            listing = cache / output["md5"][:2] / output["md5"][2:]
            if not listing.exists():
                return True  # the hashes of the folder's files are on another machine
            files = {f"{output['path']}/{file['relpath']}": file["md5"] for file in json.loads(listing.read_bytes())}
            return bool(files.get(entry["path"]) == entry["md5"])
    return True  # code, or data that no stage writes


def _git(project: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails."""
    process = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    return process.stdout if process.returncode == 0 else None
