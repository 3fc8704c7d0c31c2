"""test_stages_data.py also tests the cache and the metrics of the stage."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import prose
from tiny_pdfs import EXTRACT_SETTINGS, write_pdf

from pdf2lora.documents.corpus import extract_corpus, summarize
from pdf2lora.documents.extraction import Reader, extract
from pdf2lora.documents.records import Extraction
from pdf2lora.documents.sources import Source
from pdf2lora.errors import InputError


def fake_extract(
    folder: Path, sources: Mapping[Source, str], settings: Any, outcome: str = "complete"
) -> Iterator[tuple[Source, Extraction]]:
    for source in sources:
        text = (folder / source.path).read_text()
        yield source, Extraction(1, 1, "pypdf2", {"pypdf2": outcome}, len(text), text)


def write_files(folder: Path, texts: dict[str, str]) -> list[Source]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [Source(Path(name)) for name in texts]


def test_a_pdf_becomes_a_document(tmp_path: Path) -> None:
    write_pdf(tmp_path / "reports/sea.pdf", [prose(1)])
    [document] = extract_corpus(
        tmp_path, [Source(Path("reports/sea.pdf"))], tmp_path / "cache", EXTRACT_SETTINGS, extract
    )
    assert (document.id, document.engine, document.reason) == ("reports/sea.pdf", "pdfium", None)
    assert document.text.split() == prose(1).split()
    assert document.characters == len(document.text)


def test_the_first_of_two_equal_texts_is_kept(tmp_path: Path) -> None:
    files = write_files(tmp_path / "pdfs", {"b.pdf": "sea", "a.pdf": "sea", "c.pdf": "ice"})
    documents = extract_corpus(tmp_path / "pdfs", files, tmp_path / "cache", EXTRACT_SETTINGS, fake_extract)
    assert [(d.id, d.reason, d.text) for d in documents] == [
        ("b.pdf", None, "sea"),
        ("a.pdf", "duplicate", ""),
        ("c.pdf", None, "ice"),
    ]


def change(folder: Path) -> None:
    (folder / "a.pdf").write_text("another sea")


def add(folder: Path) -> None:
    (folder / "b.pdf").write_text("ice")


def delete(folder: Path) -> None:
    (folder / "a.pdf").unlink()


@pytest.mark.parametrize("disturb", [change, add, delete])
def test_a_corpus_that_changes_during_the_extraction_is_refused(tmp_path: Path, disturb: Any) -> None:
    """A new file too: DVC hashes the corpus after the stage, so the next run would not read the file."""
    sources = write_files(tmp_path / "pdfs", {"a.pdf": "sea"})

    def disturbed(folder: Path, *arguments: Any) -> Iterator[tuple[Source, Extraction]]:
        yield from fake_extract(folder, *arguments)
        disturb(folder)

    with pytest.raises(InputError, match=f"{tmp_path}/pdfs changed during the extraction"):
        list(extract_corpus(tmp_path / "pdfs", sources, tmp_path / "cache", EXTRACT_SETTINGS, disturbed))


def test_a_file_that_is_missing_before_it_is_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pdf changed during the extraction"):
        list(extract_corpus(tmp_path, [Source(Path("gone.pdf"))], tmp_path / "cache", EXTRACT_SETTINGS, fake_extract))


@pytest.mark.parametrize("disturb", [change, delete])
def test_a_file_that_changes_while_it_is_read_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturb: Any
) -> None:
    write_pdf(tmp_path / "pdfs/a.pdf", [prose(1)])
    read = Reader.read

    def disturbed(reader: Reader, file: Path) -> Extraction:
        extraction = read(reader, file)
        disturb(tmp_path / "pdfs")
        return extraction

    monkeypatch.setattr(Reader, "read", disturbed)
    with pytest.raises(InputError, match=r"a\.pdf changed during the extraction"):
        list(extract_corpus(tmp_path / "pdfs", [Source(Path("a.pdf"))], tmp_path / "cache", EXTRACT_SETTINGS, extract))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("outcome", "num_cached"), [("complete", 1), ("damaged", 1), ("crashed", 0)])
def test_a_crash_is_not_cached(tmp_path: Path, outcome: str, num_cached: int) -> None:
    run = partial(fake_extract, outcome=outcome)
    files = write_files(tmp_path / "pdfs", {"a.pdf": "sea"})
    list(extract_corpus(tmp_path / "pdfs", files, tmp_path / "cache", EXTRACT_SETTINGS, run))
    assert len(list((tmp_path / "cache").glob("*.json"))) == num_cached


def test_a_summary_counts_reasons_engines_and_partial_documents(tmp_path: Path) -> None:
    run = partial(fake_extract, outcome="timed_out")
    files = write_files(tmp_path / "pdfs", {"a.pdf": "sea", "b.pdf": "sea", "c.pdf": "ice"})
    assert summarize(extract_corpus(tmp_path / "pdfs", files, tmp_path / "cache", EXTRACT_SETTINGS, run)) == {
        "documents": 3,
        "kept": 2,
        "left_out": {"duplicate": 1},
        "engine": {"pypdf2": 2},
        "language": {"None": 2},
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
