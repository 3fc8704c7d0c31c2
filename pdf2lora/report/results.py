"""The results of one run, read from metrics/, data/ and dvc.lock."""

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
    """A file or folder in dvc.lock. The md5 of a folder is that of its list of files and ends in .dir."""

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
    kept_step: int | None  # whose adapter train kept; None if it kept the last one
    test_documents: list[dict[str, Any]]  # rows of eval_documents.csv
    documents: list[Document]  # all of the corpus
    split_of: dict[str, str]  # id of a kept document -> train, validation or test
    samples: list[dict[str, Any]]
    artifacts: list[Artifact]
    licence_files: list[str]  # of the source model


def read_results(source: Path, paths: Iterable[str]) -> Results:
    """Reads the outputs of the stages in the current folder.

    source: the folder of the source model; paths: files and folders whose hashes dvc.lock gives.
    """
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
        kept_step=_json("metrics/train/metrics.json").get("kept_step"),
        test_documents=_rows(Path("metrics/eval_documents.csv")),
        documents=list(read_documents(Path("data/documents.jsonl"))),
        split_of={d.id: split for split in SPLITS for d in read_documents(Path(f"data/split/{split}.jsonl"))},
        samples=_json("data/samples.json"),
        artifacts=read_artifacts(Path("dvc.lock"), paths),
        licence_files=find_licences(source),
    )


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


def read_artifacts(lock: Path, paths: Iterable[str]) -> list[Artifact]:
    """These files and folders in dvc.lock; unknown ones are left out.

    DVC updates the lock after each stage. So while report runs, the entry of report is that of the previous run, and is
    not read.
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
