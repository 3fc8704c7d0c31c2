"""PDFs that were made to harm: they hang, exhaust memory or make cleaning slow."""

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import hanging_pdf, prose, raw_pdf, shown

from pdf2lora.documents import cleaning, worker
from pdf2lora.documents.extraction import extract
from tests.long.fuzz import fuzz_pdfs

READ: dict[str, Any] = {
    "engines": ["pypdf2"],
    "max_pages": 30,
    "timeout_s": 1.5,
    "memory_gib": 1.0,
    "clean": True,
    "min_characters": 100,
    "num_workers": 1,
}


def test_some_dozens_of_mutated_pdfs(tmp_path: Path) -> None:
    assert fuzz_pdfs(tmp_path / "pdfs", 40, seed=7, num_workers=2).startswith("fuzz: 40 PDFs")


def test_a_document_that_hangs_on_page_20_keeps_its_19(tmp_path: Path) -> None:
    file = tmp_path / "hangs.pdf"
    file.write_bytes(hanging_pdf(*(prose(number) for number in range(19))))

    [(_, extraction)] = extract([file], **READ)

    assert (extraction.num_pages, extraction.pages_read, extraction.reason) == (20, 19, None)
    assert extraction.attempts == {"pypdf2": "timed_out"}
    assert " ".join(extraction.text.split()) == " ".join(" ".join(prose(number) for number in range(19)).split())


def test_a_text_larger_than_any_document_stops_at_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker has the memory for would still be too much for the parent, which collects and cleans it."""
    line = "the sea rises and the ice melts " * 3000
    file = tmp_path / "swells.pdf"
    file.write_bytes(raw_pdf(shown(prose(1)), *[shown(line)] * 4))
    sent: list[tuple[str, object]] = []
    monkeypatch.setattr(worker, "MAX_CHARACTERS", 150_000)

    outcome = worker._read_pages(type("Pipe", (), {"send": sent.append})(), file, "pypdf2", 30)  # type: ignore[arg-type]

    assert outcome == "out_of_memory"
    assert [kind for kind, _ in sent] == ["num_pages", "page", "page"]


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, ("a" * 1000 + "-") * 1000, "ab cd ef\n" * 10**5, "....   " * 10**5, "ab-\n" * 10**5, "ﷺ" * 10**5],
    ids=["one word", "hyphens", "lines", "dots", "cuts", "ligatures"],
)
def test_no_text_makes_cleaning_slow(text: str) -> None:
    """It runs in the parent, where nothing would stop it. Quadratic, the first one takes hours."""
    started = time.process_time()

    cleaning.clean([text, text])

    assert time.process_time() - started < 20
