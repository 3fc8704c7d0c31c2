"""The results of one run, read from metrics/, data/ and dvc.lock."""

import csv
import json
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.documents.records import SPLITS, Document, read_documents
from pdf2lora.paths import DOCUMENTS, EVAL_DOCUMENTS, SPLIT_DOCUMENTS
from pdf2lora.runtime.scratch import pipeline_stages
from pdf2lora.weights.licences import find_licences

Curve = tuple[list[float], list[float]]  # x, y

PLOTS = Path("metrics/train/plots/metrics")
MAX_LISTED = 500  # documents in the page's table
NUM_EXAMPLES = 5  # documents that the page names for each reason


@dataclass(frozen=True)
class Artifact:
    """A file or folder in dvc.lock. The md5 of a folder is the md5 of its list of files, and ends in .dir."""

    path: str
    md5: str
    size: int  # bytes
    num_files: int


@dataclass(frozen=True)
class Results:
    """One run, without the numbers of one machine."""

    extract: dict[str, Any]
    split: dict[str, Any]
    tokenize: dict[str, Any]
    convert: dict[str, Any]
    batch: dict[str, Any]
    evaluation: dict[str, Any]
    curves: dict[str, Curve]  # train/loss, validation/loss, learning_rate, ... -> steps, values
    kept_step: int | None  # train kept the adapter of this step; None if it kept the last one
    planned_steps: int | None  # of the training, if early stopping ended it; else None
    replay_share: float | None  # of the training tokens; None without replay text
    test_documents: list[dict[str, Any]]  # rows of eval_documents.csv
    documents: list[Document]  # the first MAX_LISTED of the corpus, without their text
    split_of: dict[str, str]  # id of one of these documents -> train, validation or test
    excluded: dict[str, list[str]]  # reason -> ids of the first NUM_EXAMPLES documents
    samples: list[dict[str, Any]]
    artifacts: list[Artifact]
    licence_files: list[str]  # of the source model


def read_results(source: Path, paths: Iterable[Path]) -> Results:
    """Reads the outputs of the stages in the current folder. Memory does not grow with the corpus.

    source: the folder of the source model; paths: files and folders whose hashes are read from dvc.lock.
    """
    documents, excluded = _read_corpus(DOCUMENTS)
    training = _json("metrics/train/metrics.json")
    return Results(
        extract=_json("metrics/extract.json"),
        split=_json("metrics/split.json"),
        tokenize=_json("metrics/tokenize.json"),
        convert=_json("metrics/convert.json"),
        batch=_json("metrics/batch.json"),
        evaluation=_json("metrics/eval.json"),
        curves={
            str(file.relative_to(PLOTS).with_suffix("")): read_curve(file) for file in sorted(PLOTS.rglob("*.tsv"))
        },
        kept_step=training.get("kept_step"),
        planned_steps=training.get("planned_steps"),
        replay_share=training.get("replay_share"),
        test_documents=_rows(EVAL_DOCUMENTS),
        documents=documents,
        split_of=_read_splits({document.id for document in documents}),
        excluded=excluded,
        samples=_json("data/samples.json"),
        artifacts=read_artifacts(Path("dvc.lock"), paths),
        licence_files=find_licences(source),
    )


def _read_corpus(file: Path) -> tuple[list[Document], dict[str, list[str]]]:
    """Results.documents and Results.excluded."""
    documents: list[Document] = []
    excluded: dict[str, list[str]] = {}
    for document in read_documents(file):
        if len(documents) < MAX_LISTED:
            documents.append(replace(document, text=""))
        if document.reason is not None:
            ids = excluded.setdefault(document.reason, [])
            ids += [document.id] if len(ids) < NUM_EXAMPLES else []
    return documents, dict(sorted(excluded.items()))


def _read_splits(ids: Set[str]) -> dict[str, str]:
    """Document id -> split, for those of these documents that are kept."""
    return {
        document.id: split
        for split in SPLITS
        for document in read_documents(SPLIT_DOCUMENTS / f"{split}.jsonl")
        if document.id in ids
    }


def read_curve(file: Path) -> Curve:
    """The columns step and value of a file of dvclive."""
    table = read_columns(file)
    steps, values = list(table.values())[:2]
    return steps, values


def read_columns(file: Path) -> dict[str, list[float]]:
    """The columns of a tab-separated file of numbers; an empty field becomes nan."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def read_artifacts(lock: Path, paths: Iterable[Path]) -> list[Artifact]:
    """Reads the entries of these files and folders in dvc.lock. Unknown ones are left out.

    DVC updates dvc.lock after each stage. So while report runs, its own entry is of the previous run; it is not read.
    Neither are stages that dvc.yaml no longer has: DVC keeps their entries.
    """
    if not lock.exists():
        return []
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
    current = [stages[name] for name in pipeline_stages() if name in stages and name != "report"]
    entries = {entry["path"]: entry for kind in ("deps", "outs") for stage in current for entry in stage.get(kind, ())}
    return [
        Artifact(path, entry["md5"], entry["size"], entry.get("nfiles", 1))
        for path in map(str, paths)
        if "md5" in (entry := entries.get(path, {}))
    ]


def _json(file: str) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {name: value if name == "id" else float(value) for name, value in row.items()}
            for row in csv.DictReader(lines)
        ]
