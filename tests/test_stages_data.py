"""The stages check, extract and split. Each test runs them as functions in an empty project."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, make_document, prose, write_documents
from tiny_pdfs import write_pdf

from pdf2lora.documents import ocr
from pdf2lora.documents.extraction import extract as extract_pdfs
from pdf2lora.documents.records import SPLITS, Document, Extraction, read_documents
from pdf2lora.documents.sources import Source
from pdf2lora.errors import InputError
from stages import check, extract, split

CORPUS = Path("data/pdfs/reports")
DOCUMENTS = Path("data/documents.jsonl")
QUICK = {
    "corpus": "reports",
    "extract.min_characters": 100,
    "extract.timeout_s": 20,
    "extract.memory_gib": 0.5,
    "extract.ocr": "none",
}

WriteParams = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_params: WriteParams, one_core: None) -> WriteParams:
    """Makes an empty project and changes to its folder. Returns a function that writes params.yaml with changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    CORPUS.mkdir(parents=True)
    write_params(QUICK)
    return lambda changes: write_params(QUICK | changes)


@pytest.fixture
def extracted_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all PDFs that a stage extracted up to now."""
    names: list[str] = []

    def recorded(folder: Path, sources: dict[Source, str], settings: Any) -> Iterator[tuple[Source, Extraction]]:
        names.extend(source.path.name for source in sources)
        yield from extract_pdfs(folder, sources, settings)

    monkeypatch.setattr(extract, "extract", recorded)
    return names


def error_message(main: Callable[[], None]) -> str:
    """Returns the error message of a stage that ends with a user error."""
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, str)
    return caught.value.code


def metrics(stage: str) -> dict[str, Any]:
    return dict(json.loads(Path(f"metrics/{stage}.json").read_text(encoding="utf-8")))


def by_id(documents: Iterable[Document]) -> dict[str, Document]:
    return {document.id: document for document in documents}


@pytest.mark.usefixtures("project")
def test_extract_records_every_pdf(pdfs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_pdf(CORPUS / "a.pdf", [prose(1), prose(2)])
    write_pdf(CORPUS / "2024" / "wg1" / "Übersicht.PDF", [prose(3)])
    shutil.copy(CORPUS / "a.pdf", CORPUS / "same_bytes.pdf")
    write_pdf(CORPUS / "same_text.pdf", [f"{prose(1)}\n{prose(2)}"])
    for name in ("password", "scan", "one_bad_page"):
        shutil.copy(pdfs[name], CORPUS)
    (CORPUS / "notes.txt").write_text("no PDF")

    extract.main()

    documents = by_id(read_documents(DOCUMENTS))
    assert {name: document.reason for name, document in documents.items()} == {
        "2024/wg1/Übersicht.PDF": None,
        "a.pdf": None,
        "one_bad_page.pdf": None,
        "password.pdf": "encrypted",
        "same_bytes.pdf": "duplicate",
        "same_text.pdf": "duplicate",
        "scan.pdf": "no_text_layer",
    }
    assert list(documents) == sorted(documents)
    kept = [document for document in documents.values() if document.reason is None]
    assert all(len(document.text) == document.characters > 100 for document in kept)
    assert all(document.text == "" and document.characters == 0 for document in documents.values() if document.reason)
    assert documents["a.pdf"].sha256 == documents["same_bytes.pdf"].sha256 != documents["same_text.pdf"].sha256
    assert metrics("extract") == {
        "documents": 7,
        "kept": 3,
        "left_out": {"duplicate": 2, "encrypted": 1, "no_text_layer": 1},
        "engine": {"pdfium": 3},
        "language": {"en": 3},
        "partial": 0,
        "pages_read": 2 + 1 + 3,
        "pages_unread": 0,
        "pages_unreadable": 0,
        "pages_ocr": 0,
        "pages_reordered": 0,
        "characters_raw": sum(document.characters_raw for document in kept),
        "characters": sum(document.characters for document in kept),
        "removed": {},
    }
    assert "extract: 3 of 7 PDFs kept, 6 pages" in capsys.readouterr().out


def test_partial_documents_are_counted(project: WriteParams, pdfs: dict[str, Path]) -> None:
    project({"extract.engines": ["pypdf2"]})
    for name in ("one_bad_page", "plain"):
        shutil.copy(pdfs[name], CORPUS)
    extract.main()
    assert (metrics("extract")["kept"], metrics("extract")["partial"]) == (2, 1)


def test_unread_pages_and_linked_folders_are_reported(
    project: WriteParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project({"extract.max_pages": 2})
    write_pdf(CORPUS / "a.pdf", [prose(number) for number in range(5)])
    (CORPUS / "linked").symlink_to(tmp_path)
    extract.main()
    assert metrics("extract")["pages_unread"] == 3
    output = capsys.readouterr().out
    assert "3 pages after the first 2 of a document are not read (extract.max_pages)" in output
    assert f"the linked folder {CORPUS}/linked is not read" in output


@pytest.mark.parametrize(
    ("setting", "is_installed"), [("none", True), ("auto", False), ("auto", True), ("rapidocr", True)]
)
def test_ocr_is_used_if_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, is_installed: bool
) -> None:
    monkeypatch.setattr(ocr, "installed_version", lambda: "rapidocr 3" if is_installed else None)
    assert extract.require_ocr(setting) == (None if setting == "none" or not is_installed else "rapidocr 3")
    assert ("OCR is off" in capsys.readouterr().out) == (not is_installed)


def test_required_ocr_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "installed_version", lambda: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-ocr\.txt"):
        extract.require_ocr("rapidocr")


@pytest.mark.usefixtures("project")
def test_only_new_pdfs_are_extracted(extracted_names: list[str]) -> None:
    for name in ("a", "b"):
        write_pdf(CORPUS / f"{name}.pdf", [prose(ord(name))])
    extract.main()
    assert sorted(extracted_names) == ["a.pdf", "b.pdf"]
    first = DOCUMENTS.read_bytes()

    extracted_names.clear()
    DOCUMENTS.unlink()
    extract.main()
    assert extracted_names == []
    assert DOCUMENTS.read_bytes() == first

    write_pdf(CORPUS / "c.pdf", [prose(3)])
    (CORPUS / "a.pdf").rename(CORPUS / "renamed.pdf")
    extract.main()
    assert extracted_names == ["c.pdf"]
    assert list(by_id(read_documents(DOCUMENTS))) == ["b.pdf", "c.pdf", "renamed.pdf"]


def test_other_settings_use_another_cache(project: WriteParams, extracted_names: list[str]) -> None:
    write_pdf(CORPUS / "a.pdf", [prose(1), prose(2)])
    extract.main()
    project({"extract.max_pages": 1})
    extract.main()
    assert extracted_names == ["a.pdf", "a.pdf"]
    assert next(read_documents(DOCUMENTS)).pages_read == 1
    project({"lora.r": 16})
    extract.main()
    assert len(extracted_names) == 2


@pytest.mark.usefixtures("project")
def test_an_interrupted_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_pdf(CORPUS / f"{name}.pdf", [prose(ord(name))])

    def interrupted(folder: Path, sources: dict[Source, str], settings: Any) -> Iterator[tuple[Source, Extraction]]:
        yield next(extract_pdfs(folder, sources, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "extract", interrupted)
    with pytest.raises(SystemExit, match="stopped by Ctrl-C"):
        extract.main()
    assert not DOCUMENTS.exists()
    assert len(list(Path(".scratch/extract").glob("*/*.json"))) == 1
    assert not list(Path(".scratch").rglob("*.partial"))

    remaining: list[Source] = []

    def recorded(folder: Path, sources: dict[Source, str], settings: Any) -> Iterator[tuple[Source, Extraction]]:
        remaining.extend(sources)
        return extract_pdfs(folder, sources, settings)

    monkeypatch.setattr(extract, "extract", recorded)
    extract.main()
    assert len(remaining) == 1
    assert metrics("extract")["kept"] == 2


def test_the_cache_is_in_the_main_checkout(
    project: WriteParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main_checkout"))
    write_pdf(CORPUS / "a.pdf", [prose(1)])
    extract.main()
    assert len(list((tmp_path / "main_checkout" / ".scratch" / "extract").glob("*/*.json"))) == 1
    assert not (tmp_path / ".scratch/extract").exists()


def has_no_outputs() -> bool:
    return not DOCUMENTS.exists() and not Path("metrics").exists() and not list(Path("data").glob(".*"))


def test_check_refuses_an_unknown_corpus_and_lists_the_known_ones(project: WriteParams) -> None:
    Path("data/pdfs/climate").mkdir()
    Path("data/pdfs/notes.txt").touch()
    project({"corpus": "reprots"})
    assert error_message(check.main) == (
        "error: corpus: 'reprots' must be a folder of data/pdfs (existing ones: climate, reports). "
        "Put your PDFs there, or choose another folder with -S corpus=..."
    )
    assert has_no_outputs()


def test_check_refuses_a_corpus_without_pdfs(project: WriteParams) -> None:
    Path("data/pdfs/demo").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "models/source/demo", "models/source/demo")
    project({"corpus": "demo"})
    assert error_message(check.main).startswith("error: corpus: data/pdfs/demo has no .pdf file.")
    assert has_no_outputs()


def test_check_refuses_an_unknown_model(project: WriteParams) -> None:
    project({"model": "llama_8b"})
    assert error_message(check.main) == (
        "error: model: 'llama_8b' must be a folder of models/source (existing ones: none). "
        "Put the source model there, or choose another folder with -S model=..."
    )
    assert has_no_outputs()


def test_check_refuses_a_source_model_that_cannot_be_used(project: WriteParams) -> None:
    Path("data/pdfs/demo").mkdir(parents=True)
    Path("data/pdfs/demo/a.pdf").touch()
    shutil.copytree(REPOSITORY / "models/source/demo", "models/source/demo")
    Path("models/source/demo/tokenizer.model").unlink()
    project({"corpus": "demo"})
    assert error_message(check.main).startswith("error: models/source/demo/tokenizer.model: the file is missing.")
    assert has_no_outputs()


def test_the_output_of_check_does_not_depend_on_the_corpus(project: WriteParams) -> None:
    outputs = set()
    for name in ("reports", "climate"):
        Path("data/pdfs", name).mkdir(exist_ok=True)
        Path("data/pdfs", name, "a.pdf").touch()
        shutil.copytree(REPOSITORY / "models/source/demo", "models/source/demo", dirs_exist_ok=True)
        project({"corpus": name, "model": "demo"})
        check.main()
        outputs.add(Path("data/checked").read_text())
    assert len(outputs) == 1


@pytest.mark.usefixtures("project")
def test_a_folder_without_pdfs_is_refused() -> None:
    (CORPUS / "notes.txt").touch()
    (CORPUS / "folder.pdf").mkdir()
    assert error_message(extract.main) == (
        "error: corpus: data/pdfs/reports has no .pdf file. Put PDFs there or select another corpus. "
        "1 other files in data/pdfs/reports (.txt) are not read, because they do not end in .pdf."
    )
    assert has_no_outputs()


@pytest.mark.usefixtures("project")
def test_a_corpus_without_usable_pdfs_is_refused(pdfs: dict[str, Path]) -> None:
    for name in ("password", "scan", "truncated", "no_pdf"):
        shutil.copy(pdfs[name], CORPUS)
    assert error_message(extract.main) == (
        "error: data/pdfs/reports: none of the 4 PDFs is usable (2 damaged, 1 encrypted, 1 no_text_layer). "
        "Add PDFs with a text layer."
    )
    assert has_no_outputs()


@pytest.mark.parametrize("stage", [check, extract, split])
def test_wrong_params_stop_a_stage_before_it_writes(project: WriteParams, stage: Any) -> None:
    project({"split.test_fraction": 2.0})
    assert error_message(stage.main).startswith(
        "error: split.test_fraction is 2.0; it must be less than 1. Change it in params.yaml"
    )
    assert has_no_outputs()


def write_corpus(number: int) -> None:
    """Writes `number` usable documents, and one that is left out."""
    left_out = make_document("left_out.pdf", "", reason="encrypted")
    write_documents(DOCUMENTS, [left_out, *(make_document(f"{n}.pdf", prose(n)) for n in range(number))])


@pytest.mark.usefixtures("project")
def test_split_writes_three_files_and_their_counts(capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(20)
    split.main()
    splits = {name: list(read_documents(Path(f"data/split/{name}.jsonl"))) for name in SPLITS}
    assert {name: len(documents) for name, documents in splits.items()} == {"train": 17, "validation": 1, "test": 2}
    assert sorted(d.id for documents in splits.values() for d in documents) == sorted(f"{n}.pdf" for n in range(20))
    assert metrics("split") == {
        name: {
            "documents": len(documents),
            "characters": sum(len(d.text) for d in documents),
            "words": 120 * len(documents),
        }
        for name, documents in splits.items()
    } | {"test_13grams_in_train": 0.0}
    assert capsys.readouterr().out.startswith(
        "split: 17 train, 1 validation, 2 test documents; 20 new texts compared, "
    )


def test_split_writes_the_groups_of_the_test_documents(project: WriteParams) -> None:
    project({"split.test_fraction": 0.5})
    versions = [make_document(f"{n}-{version}.pdf", f"{prose(n)} {version}") for n in range(8) for version in "ab"]
    write_documents(DOCUMENTS, versions)
    split.main()
    ids = [document.id for document in read_documents(Path("data/split/test.jsonl"))]
    groups = json.loads(Path("data/split/test_groups.json").read_text())
    assert groups == [place for place in range(4) for _ in "ab"]
    assert [name[0] for name in ids[::2]] == [name[0] for name in ids[1::2]]


@pytest.mark.usefixtures("project")
def test_a_warning_if_a_very_long_document_is_not_in_train(capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(5)
    split.main()
    [test] = read_documents(Path("data/split/test.jsonl"))
    assert "warning" not in capsys.readouterr().out
    documents = list(read_documents(DOCUMENTS))
    write_documents(DOCUMENTS, [replace(d, characters=10**6 if d.id == test.id else 500) for d in documents])
    split.main()
    assert "split: warning: train has only 0% of the characters" in capsys.readouterr().out


@pytest.mark.usefixtures("project")
def test_only_new_texts_are_sketched(capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(20)
    split.main()
    before = Path("data/split/train.jsonl").read_bytes()
    split.main()
    assert Path("data/split/train.jsonl").read_bytes() == before
    write_corpus(21)
    split.main()
    assert re.findall(r"; (\d+) new texts", capsys.readouterr().out) == ["20", "0", "1"]


def test_split_without_validation_writes_an_empty_file(project: WriteParams) -> None:
    project({"split.validation_fraction": 0.0})
    write_corpus(4)
    split.main()
    assert Path("data/split/validation.jsonl").read_bytes() == b""
    assert metrics("split")["validation"] == {"documents": 0, "characters": 0, "words": 0}


def test_split_uses_the_seed_of_params(project: WriteParams) -> None:
    tests = set()
    for seed in range(4):
        project({"split.seed": seed})
        write_corpus(12)
        split.main()
        tests.add(Path("data/split/test.jsonl").read_bytes())
    assert len(tests) > 1


@pytest.mark.usefixtures("project")
def test_one_document_is_refused() -> None:
    write_corpus(1)
    assert error_message(split.main) == (
        "error: split: the corpus has 1 usable documents in 1 groups of near-duplicates; "
        "train, validation, test need at least 3 groups. Add PDFs."
    )
    assert not Path("data/split").exists()
    assert not Path("metrics").exists()


def test_one_document_without_validation_is_refused(project: WriteParams) -> None:
    project({"split.validation_fraction": 0.0})
    write_corpus(1)
    message = error_message(split.main)
    assert message.endswith("train, test need at least 2 groups. Add PDFs.")


@pytest.mark.usefixtures("project")
def test_two_documents_can_be_split_without_validation(project: WriteParams) -> None:
    write_corpus(2)
    assert "Add PDFs or set split.validation_fraction to 0." in error_message(split.main)
    project({"split.validation_fraction": 0.0})
    split.main()
    assert (metrics("split")["train"]["documents"], metrics("split")["test"]["documents"]) == (1, 1)


@pytest.mark.parametrize("folder", [CORPUS, Path("models/source/demo")])
def test_check_names_a_file_name_that_is_not_utf_8(project: WriteParams, folder: Path) -> None:
    """DVC ends with a traceback at such a name."""
    shutil.copytree(REPOSITORY / "models/source/demo", "models/source/demo")
    (folder / "sub").mkdir()
    (folder / "sub" / os.fsdecode(b"caf\xe9.pdf")).touch()

    message = error_message(check.main)

    assert f"the name of '{folder}/sub/caf\\xe9.pdf' is not UTF-8, and DVC cannot store it. Rename" in message


@pytest.mark.parametrize("target", ["gone.pdf", "link.pdf"], ids=["gone", "loop"])
def test_check_refuses_a_link_to_no_file(project: WriteParams, target: str) -> None:
    """DVC would end with an error at such a link."""
    project({"model": "demo"})
    (CORPUS / "link.pdf").symlink_to(target)

    assert "link.pdf' leads to no file, and DVC cannot store it. Remove the link" in error_message(check.main)
