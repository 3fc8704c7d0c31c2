"""The files of a run, as the report reads them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from example_run import write_run
from helpers import REPOSITORY, make_document, write_documents
from ruamel.yaml import YAML

from pdf2lora.paths import ADAPTER, BASE, CORPORA
from pdf2lora.report import results
from pdf2lora.report.results import find_licences, read_artifacts, read_columns, read_results


def test_artifacts_have_the_order_of_the_paths():
    artifacts = read_artifacts(REPOSITORY / "dvc.lock", [BASE, Path("no/such"), CORPORA / "demo"])

    assert [artifact.path for artifact in artifacts] == ["models/base", "data/pdfs/demo"]
    assert artifacts[1].md5.endswith(".dir")
    assert artifacts[1].num_files == 43


@pytest.mark.parametrize("other", ["report", "sample"])
def test_entries_of_earlier_runs_are_not_read(tmp_path, other):
    """While report runs, its entry in the lock is that of the previous run. dvc.yaml has no stage `sample` any more."""
    previous = {"path": "models/adapter", "md5": "previous.dir", "size": 1, "nfiles": 3}
    stages = {
        "train": {"outs": [previous | {"md5": "now.dir", "nfiles": 2}]},
        "evaluate": {"deps": [previous | {"md5": "now.dir", "nfiles": 2}]},
        other: {"deps": [previous], "outs": []},
    }
    YAML(typ="safe").dump({"stages": stages}, tmp_path / "dvc.lock")

    (artifact,) = read_artifacts(tmp_path / "dvc.lock", [ADAPTER])

    assert (artifact.md5, artifact.num_files) == ("now.dir", 2)


def test_without_a_lock_there_are_no_artifacts(tmp_path):
    assert read_artifacts(tmp_path / "dvc.lock", [BASE]) == []


def test_an_empty_field_of_a_curve_is_nan(tmp_path):
    (tmp_path / "train.tsv").write_text("seconds\tgpu_power_w\n0.0\t\n1.0\t200\n")

    columns = read_columns(tmp_path / "train.tsv")

    assert math.isnan(columns["gpu_power_w"][0])
    assert columns["gpu_power_w"][1] == 200


@pytest.mark.parametrize("name", ["LICENSE", "Licence.txt", "USE_POLICY.md", "NOTICE"])
def test_licences_are_found_by_name(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "params.json").touch()
    (tmp_path / "LICENSES").mkdir()

    assert find_licences(tmp_path) == [name]


def test_the_documents_of_a_large_corpus_are_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "MAX_LISTED", 4)
    monkeypatch.setattr(results, "NUM_EXAMPLES", 2)
    source = write_run(tmp_path) / "models/source/demo"
    documents = [make_document(f"{number}.pdf", "text") for number in range(9)]
    left_out = [replace(document, reason="damaged") for document in documents[3:]]
    write_documents(tmp_path / "data/documents.jsonl", [*documents[:3], *left_out])
    write_documents(tmp_path / "data/split/test.jsonl", documents[2:3])

    read = read_results(source, [])

    assert [document.id for document in read.documents] == ["0.pdf", "1.pdf", "2.pdf", "3.pdf"]
    assert {document.text for document in read.documents} == {""}
    assert read.split_of == {"2.pdf": "test"}
    assert read.excluded == {"damaged": ["3.pdf", "4.pdf"]}
