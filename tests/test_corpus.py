"""The cache and the stage's metrics are also tested in test_stages_data.py."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EXTRACT_SETTINGS, prose, write_pdf

from pdf2lora.documents import corpus
from pdf2lora.documents.corpus import extract_corpus, find_linked_folders, find_pdfs, summarize
from pdf2lora.documents.records import Extraction
from pdf2lora.errors import InputError


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The attempts of each extraction that the fake engines return; a test can change them."""
    attempts = {"pypdf2": "complete"}

    def extract(files: Iterable[Path], **settings: Any) -> Iterator[tuple[Path, Extraction]]:
        for file in files:
            text = file.read_text()
            yield file, Extraction(1, 1, "pypdf2", dict(attempts), len(text), text, None)

    monkeypatch.setattr(corpus, "extract", extract)
    return attempts


def write_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_pdfs_are_found_in_sub_folders_and_sorted(tmp_path: Path) -> None:
    for name in ("b.pdf", "a/z.PDF", "a/notes.txt", "c.pdf.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.pdf").mkdir()
    assert find_pdfs(tmp_path) == [tmp_path / "a/z.PDF", tmp_path / "b.pdf"]


def test_a_folder_without_pdfs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no \.pdf file"):
        find_pdfs(tmp_path)


def test_a_linked_folder_is_found_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.pdf").touch()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    assert find_linked_folders(tmp_path / "corpus") == [tmp_path / "corpus/linked"]
    with pytest.raises(InputError, match="Linked folders are not read"):
        find_pdfs(tmp_path / "corpus")
    (tmp_path / "corpus/b.pdf").symlink_to(tmp_path / "elsewhere/a.pdf")
    assert find_pdfs(tmp_path / "corpus") == [tmp_path / "corpus/b.pdf"]


def test_a_pdf_becomes_a_document(tmp_path: Path) -> None:
    file = write_pdf(tmp_path / "reports/sea.pdf", [prose(1)])
    [document] = extract_corpus(tmp_path, [file], tmp_path, EXTRACT_SETTINGS)
    assert (document.id, document.engine, document.reason) == ("reports/sea.pdf", "pdfium", None)
    assert document.text.split() == prose(1).split()
    assert document.characters == len(document.text)


@pytest.mark.usefixtures("attempts")
def test_the_first_of_two_equal_texts_is_kept(tmp_path: Path) -> None:
    files = write_files(tmp_path / "pdfs", {"b.pdf": "sea", "a.pdf": "sea", "c.pdf": "ice"})
    documents = extract_corpus(tmp_path / "pdfs", files, tmp_path, EXTRACT_SETTINGS)
    assert [(d.id, d.reason, d.text) for d in documents] == [
        ("b.pdf", None, "sea"),
        ("a.pdf", "duplicate", ""),
        ("c.pdf", None, "ice"),
    ]


@pytest.mark.usefixtures("attempts")
def test_a_file_that_changes_during_the_extraction_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [file] = write_files(tmp_path / "pdfs", {"a.pdf": "sea"})
    hashes = iter(["before", "after"])
    monkeypatch.setattr(corpus, "file_sha256", lambda file: next(hashes))
    with pytest.raises(InputError, match=f"{file} changed during the extraction"):
        extract_corpus(tmp_path / "pdfs", [file], tmp_path, EXTRACT_SETTINGS)


@pytest.mark.parametrize(("outcome", "num_cached"), [("complete", 1), ("damaged", 1), ("crashed", 0)])
def test_a_crash_is_not_cached(tmp_path: Path, attempts: dict[str, str], outcome: str, num_cached: int) -> None:
    attempts["pypdf2"] = outcome
    files = write_files(tmp_path / "pdfs", {"a.pdf": "sea"})
    extract_corpus(tmp_path / "pdfs", files, tmp_path / "cache", EXTRACT_SETTINGS)
    assert len(list((tmp_path / "cache").glob("*.json"))) == num_cached


def test_a_summary_counts_reasons_engines_and_partial_documents(tmp_path: Path, attempts: dict[str, str]) -> None:
    attempts["pypdf2"] = "timed_out"
    files = write_files(tmp_path / "pdfs", {"a.pdf": "sea", "b.pdf": "sea", "c.pdf": "ice"})
    assert summarize(extract_corpus(tmp_path / "pdfs", files, tmp_path, EXTRACT_SETTINGS)) == {
        "documents": 3,
        "kept": 2,
        "left_out": {"duplicate": 1},
        "engine": {"pypdf2": 2},
        "partial": 2,
        "pages_read": 2,
        "pages_unread": 0,
        "pages_unreadable": 0,
        "pages_ocr": 0,
        "pages_reordered": 0,
        "characters_raw": 6,
        "characters": 6,
        "removed": {},
    }
