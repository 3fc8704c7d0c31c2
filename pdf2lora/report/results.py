"""What the report tells of one run, read from metrics/, data/ and dvc.lock."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.documents.records import SPLITS, Document, read_documents
from pdf2lora.weights.licences import find_licences

Curve = tuple[list[float], list[float]]  # x, y

PLOTS = Path("metrics/train/plots/metrics")


@dataclass(frozen=True)
class Artifact:
    """A file or folder as dvc.lock has it: md5 of a file, of the list of files for a folder (it ends in .dir)."""

    path: str
    md5: str
    size: int  # bytes
    num_files: int


@dataclass(frozen=True)
class Results:
    """One run, without anything that only this machine measured."""

    extract: dict[str, Any]
    split: dict[str, Any]
    convert: dict[str, Any]
    batch: dict[str, Any]
    evaluation: dict[str, Any]
    curves: dict[str, Curve]  # train/loss, validation/loss, learning_rate, ... -> steps, values
    test_documents: list[dict[str, Any]]  # rows of eval_documents.csv
    documents: list[Document]  # all of the corpus
    split_of: dict[str, str]  # id of a kept document -> train, validation or test
    samples: list[dict[str, Any]]
    artifacts: list[Artifact]
    licence_files: list[str]  # that came with the checkpoint


def read_results(checkpoint: Path, paths: Iterable[str]) -> Results:
    """Reads what the stages wrote, from the project's folder; `paths`: what to look up in dvc.lock."""
    return Results(
        extract=_json("metrics/extract.json"),
        split=_json("metrics/split.json"),
        convert=_json("metrics/convert.json"),
        batch=_json("metrics/batch.json"),
        evaluation=_json("metrics/eval.json"),
        curves={
            str(file.relative_to(PLOTS).with_suffix("")): read_curve(file) for file in sorted(PLOTS.rglob("*.tsv"))
        },
        test_documents=_rows(Path("metrics/eval_documents.csv")),
        documents=read_documents(Path("data/documents.jsonl")),
        split_of={d.id: split for split in SPLITS for d in read_documents(Path(f"data/split/{split}.jsonl"))},
        samples=_json("data/samples.json"),
        artifacts=read_artifacts(Path("dvc.lock"), paths),
        licence_files=find_licences(checkpoint),
    )


def read_curve(file: Path) -> Curve:
    """The two columns of one of dvclive's files, step and value."""
    table = read_columns(file)
    steps, values = list(table.values())[:2]
    return steps, values


def read_columns(file: Path) -> dict[str, list[float]]:
    """The columns of a file of numbers with tabs between them; a gap becomes nan."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def read_artifacts(lock: Path, paths: Iterable[str]) -> list[Artifact]:
    """These files and folders in dvc.lock; unknown ones are left out.

    DVC brings the lock up to date after each stage: while report runs, its own entry alone is that of the run before.
    """
    if not lock.exists():
        return []
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
    current = [stage for name, stage in stages.items() if name != "report"]
    entries = {entry["path"]: entry for stage in current for kind in ("deps", "outs") for entry in stage.get(kind, ())}
    return [
        Artifact(path, entry["md5"], entry["size"], entry.get("nfiles", 1))
        for path in paths
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
