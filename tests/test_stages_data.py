"""The stages check, extract and split, run as functions in a project of their own."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import prose, write_pdf

from pdf2lora.documents import corpus as pdf
from pdf2lora.documents.records import Document, Extraction, read_documents, write_documents
from stages import check, extract, split

CORPUS = Path("data/pdfs/reports")
DOCUMENTS = Path("data/documents.jsonl")
QUICK = {"corpus": "reports", "extract.min_characters": 100, "extract.timeout_s": 20, "extract.memory_gib": 0.5}

WriteParams = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_params: WriteParams) -> WriteParams:
    """An empty project that is the current folder; gives what writes its params.yaml again, with other changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    CORPUS.mkdir(parents=True)
    write_params(QUICK)
    return lambda changes: write_params(QUICK | changes)


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the PDFs that an engine was asked to read, as it goes on."""
    names: list[str] = []
    extract_all = pdf.extract

    def recorded(files: Iterable[Path], **settings: Any) -> Iterator[tuple[Path, Extraction]]:
        asked = list(files)
        names.extend(file.name for file in asked)
        yield from extract_all(asked, **settings) if asked else iter(())

    monkeypatch.setattr(pdf, "extract", recorded)
    return names


def refusal(main: Callable[[], None]) -> str:
    """What a stage says when it ends with an error of the user's."""
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, str)
    return ended.value.code


def metrics(stage: str) -> dict[str, Any]:
    return dict(json.loads(Path(f"metrics/{stage}.json").read_text(encoding="utf-8")))


def by_id(documents: Iterable[Document]) -> dict[str, Document]:
    return {document.id: document for document in documents}


@pytest.mark.usefixtures("project")
def test_extract_accounts_for_every_pdf(pdfs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
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
        "engine": {"pdfium": 1, "pypdf2": 2},
        "partial": 0,
        "pages_read": 2 + 1 + 3,
        "characters_raw": sum(document.characters_raw for document in kept),
        "characters": sum(document.characters for document in kept),
    }
    assert "extract: 3 of 7 PDFs kept, 6 pages" in capsys.readouterr().out


def test_documents_that_were_read_in_part_are_counted(project: WriteParams, pdfs: dict[str, Path]) -> None:
    project({"extract.engines": ["pypdf2"]})
    for name in ("one_bad_page", "plain"):
        shutil.copy(pdfs[name], CORPUS)
    extract.main()
    assert (metrics("extract")["kept"], metrics("extract")["partial"]) == (2, 1)


@pytest.mark.usefixtures("project")
def test_only_what_is_new_is_read(read_files: list[str]) -> None:
    for name in ("a", "b"):
        write_pdf(CORPUS / f"{name}.pdf", [prose(ord(name))])
    extract.main()
    assert sorted(read_files) == ["a.pdf", "b.pdf"]
    first = DOCUMENTS.read_bytes()

    read_files.clear()
    DOCUMENTS.unlink()
    extract.main()
    assert read_files == []
    assert DOCUMENTS.read_bytes() == first

    write_pdf(CORPUS / "c.pdf", [prose(3)])
    (CORPUS / "a.pdf").rename(CORPUS / "renamed.pdf")
    extract.main()
    assert read_files == ["c.pdf"]
    assert list(by_id(read_documents(DOCUMENTS))) == ["b.pdf", "c.pdf", "renamed.pdf"]


def test_other_settings_are_another_cache(project: WriteParams, read_files: list[str]) -> None:
    write_pdf(CORPUS / "a.pdf", [prose(1), prose(2)])
    extract.main()
    project({"extract.max_pages": 1})
    extract.main()
    assert read_files == ["a.pdf", "a.pdf"]
    assert read_documents(DOCUMENTS)[0].pages_read == 1
    project({"lora.r": 16})
    extract.main()
    assert len(read_files) == 2


@pytest.mark.usefixtures("project")
def test_an_interrupted_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_pdf(CORPUS / f"{name}.pdf", [prose(ord(name))])
    extract_all = pdf.extract

    def interrupted(files: Iterable[Path], **settings: Any) -> Iterator[tuple[Path, Extraction]]:
        yield next(extract_all(list(files)[:1], **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(pdf, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract.main()
    assert not DOCUMENTS.exists()
    assert len(list(Path(".scratch/extract").glob("*/*.json"))) == 1
    assert not list(Path(".scratch").rglob("*.partial"))

    asked = []
    monkeypatch.setattr(pdf, "extract", lambda files, **settings: asked.extend(files) or extract_all(files, **settings))
    extract.main()
    assert len(asked) == 1
    assert metrics("extract")["kept"] == 2


def test_the_cache_lies_in_the_main_checkout(
    project: WriteParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main_checkout"))
    write_pdf(CORPUS / "a.pdf", [prose(1)])
    extract.main()
    assert len(list((tmp_path / "main_checkout" / ".scratch" / "extract").glob("*/*.json"))) == 1
    assert not (tmp_path / ".scratch/extract").exists()


def nothing_was_written() -> bool:
    return not DOCUMENTS.exists() and not Path("metrics").exists() and not list(Path("data").glob(".*"))


def test_check_tells_an_unknown_corpus_and_the_known_ones(project: WriteParams) -> None:
    Path("data/pdfs/climate").mkdir()
    Path("data/pdfs/notes.txt").touch()
    project({"corpus": "reprots"})
    assert refusal(check.main) == (
        "error: corpus: 'reprots' must be a folder of data/pdfs (there: climate, reports); "
        "put your PDFs there, or choose another with -S corpus=..."
    )
    assert nothing_was_written()


def test_check_tells_an_unknown_model_and_that_there_is_none(project: WriteParams) -> None:
    project({"model": "llama_8b"})
    assert refusal(check.main) == (
        "error: model: 'llama_8b' must be a folder of models/source (there: none); "
        "put the checkpoint there, or choose another with -S model=..."
    )
    assert nothing_was_written()


def test_what_check_writes_does_not_depend_on_the_corpus(project: WriteParams) -> None:
    written = set()
    for corpus in ("reports", "climate"):
        Path("data/pdfs", corpus).mkdir(exist_ok=True)
        Path("models/source/demo").mkdir(parents=True, exist_ok=True)
        project({"corpus": corpus, "model": "demo"})
        check.main()
        written.add(Path("data/checked").read_text())
    assert len(written) == 1


@pytest.mark.usefixtures("project")
def test_a_folder_without_pdfs_is_refused() -> None:
    (CORPUS / "notes.txt").touch()
    (CORPUS / "folder.pdf").mkdir()
    assert refusal(extract.main) == (
        "error: corpus: data/pdfs/reports holds no file that ends in .pdf; put your PDFs there or choose another corpus"
    )
    assert nothing_was_written()


@pytest.mark.usefixtures("project")
def test_a_corpus_of_which_nothing_can_be_used_writes_nothing(pdfs: dict[str, Path]) -> None:
    for name in ("password", "scan", "truncated", "no_pdf"):
        shutil.copy(pdfs[name], CORPUS)
    assert refusal(extract.main) == (
        "error: data/pdfs/reports: none of its 4 PDFs can be used (2 damaged, 1 encrypted, 1 no_text_layer); "
        "add PDFs with a text layer"
    )
    assert nothing_was_written()


@pytest.mark.parametrize("stage", [check, extract, split])
def test_wrong_params_end_a_stage_before_it_writes(project: WriteParams, stage: Any) -> None:
    project({"split.test_fraction": 2.0})
    assert refusal(stage.main).startswith(
        "error: split.test_fraction is 2.0; it must be less than 1. Change it in params.yaml"
    )
    assert nothing_was_written()


def kept_document(number: int, **changes: Any) -> Document:
    text = prose(number)
    fields: dict[str, Any] = {
        "id": f"{number}.pdf",
        "sha256": str(number),
        "num_pages": 1,
        "pages_read": 1,
        "engine": "pypdf2",
        "attempts": {"pypdf2": "complete"},
        "characters_raw": len(text),
        "characters": len(text),
        "reason": None,
        "text": text,
    }
    return Document(**fields | changes)


def write_corpus(number: int) -> None:
    """So many documents that are kept, and one that is left out."""
    left_out = kept_document(1000, reason="encrypted", text="", characters=0)
    write_documents(DOCUMENTS, [left_out, *map(kept_document, range(number))])


@pytest.mark.usefixtures("project")
def test_split_writes_the_sides_and_their_counts(capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(20)
    split.main()
    sides = {side: read_documents(Path(f"data/split/{side}.jsonl")) for side in ("train", "validation", "test")}
    assert {side: len(documents) for side, documents in sides.items()} == {"train": 17, "validation": 1, "test": 2}
    assert sorted(d.id for documents in sides.values() for d in documents) == sorted(f"{n}.pdf" for n in range(20))
    assert metrics("split") == {
        side: {
            "documents": len(documents),
            "characters": sum(len(d.text) for d in documents),
            "words": 120 * len(documents),
        }
        for side, documents in sides.items()
    } | {"test_13grams_in_train": 0.0}
    assert capsys.readouterr().out == "split: 17 train, 1 validation, 2 test documents\n"


def test_split_without_validation_writes_an_empty_side(project: WriteParams) -> None:
    project({"split.validation_fraction": 0.0})
    write_corpus(4)
    split.main()
    assert Path("data/split/validation.jsonl").read_bytes() == b""
    assert metrics("split")["validation"] == {"documents": 0, "characters": 0, "words": 0}


def test_the_seed_of_split_is_that_of_params(project: WriteParams) -> None:
    tests = set()
    for seed in range(4):
        project({"split.seed": seed})
        write_corpus(12)
        split.main()
        tests.add(Path("data/split/test.jsonl").read_bytes())
    assert len(tests) > 1


@pytest.mark.usefixtures("project")
def test_one_document_cannot_be_split() -> None:
    write_corpus(1)
    assert refusal(split.main) == (
        "error: data/documents.jsonl: 1 documents kept, too few to split "
        "(1 groups of documents cannot fill train, validation, test); add PDFs"
    )
    assert not Path("data/split").exists()
    assert not Path("metrics").exists()


def test_one_document_without_validation_is_told_only_to_add_pdfs(project: WriteParams) -> None:
    project({"split.validation_fraction": 0.0})
    write_corpus(1)
    message = refusal(split.main)
    assert "cannot fill train, test" in message
    assert message.endswith("; add PDFs")


@pytest.mark.usefixtures("project")
def test_two_documents_can_be_split_after_the_advice(project: WriteParams) -> None:
    write_corpus(2)
    assert "set split.validation_fraction to 0" in refusal(split.main)
    project({"split.validation_fraction": 0.0})
    split.main()
    assert (metrics("split")["train"]["documents"], metrics("split")["test"]["documents"]) == (1, 1)
