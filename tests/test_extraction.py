from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from helpers import prose
from tiny_pdfs import EXTRACT_SETTINGS, extract_files, hanging_pdf, write_pdf

from pdf2lora.documents.extraction import Reader, extract, run_all
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction
from pdf2lora.documents.sources import Source
from pdf2lora.documents.worker import Worker
from pdf2lora.errors import InputError
from pdf2lora.runtime.files import file_sha256
from tests.long.fuzz import fuzz_pdfs

SHORT_TIMEOUT_S = 1.0  # for an engine that hangs


def read(file: Path, **changes: Any) -> Extraction:
    [(_, extraction)] = extract_files([file], **changes)
    return extraction


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def extractions(pdfs: dict[str, Path]) -> dict[str, Extraction]:
    """The extractions of all PDFs that need no time limit."""
    names = [name for name in pdfs if name not in ("hanging", "bomb")]
    results = extract_files([pdfs[name] for name in names])
    return dict(zip(names, [extraction for _, extraction in results], strict=True))


@pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])
def test_an_engine_reads_all_pages(pdfs: dict[str, Path], engine: str) -> None:
    extraction = read(pdfs["plain"], engines=[engine])
    assert (extraction.reason, extraction.engine, extraction.attempts) == (None, engine, {engine: "complete"})
    assert (extraction.num_pages, extraction.pages_read) == (3, 3)
    assert flat(extraction.text) == flat(" ".join(prose(seed) for seed in (1, 2, 3)))
    assert extraction.characters_raw >= len(extraction.text)


def test_all_engines_read_and_the_first_of_equal_texts_is_kept(extractions: dict[str, Extraction]) -> None:
    assert extractions["plain"].attempts == {"pdfium": "complete", "pypdf2": "complete"}
    assert extractions["plain"].engine == "pdfium"


@pytest.mark.parametrize(
    ("is_pdfium_split", "engine", "pages_of_pypdf2"), [(False, "pdfium", [4]), (True, "pypdf2", [4, 9])]
)
def test_the_second_engine_reads_the_whole_document_if_its_sample_is_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_pdfium_split: bool, engine: str, pages_of_pypdf2: list[int]
) -> None:
    num_pages: dict[str, list[int]] = {"pdfium": [], "pypdf2": []}

    def read_pages(worker: Any, file: Path, name: str, pages: Sequence[int]) -> Attempt:
        numbers = [number for number in pages if number < 9]
        num_pages[name].append(len(numbers))
        text = prose(3).replace("carbon", "car bon") if name == "pdfium" and is_pdfium_split else prose(3)
        return Attempt(name, COMPLETE, 9, [text] * len(numbers))

    monkeypatch.setattr(Worker, "read", read_pages)
    extraction = Reader(EXTRACT_SETTINGS).read(tmp_path)

    assert (num_pages["pdfium"], num_pages["pypdf2"]) == ([9], pages_of_pypdf2)
    assert (extraction.engine, extraction.pages_read) == (engine, 9)


def test_at_most_max_pages_are_read(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["plain"], max_pages=2)
    assert (extraction.num_pages, extraction.pages_read) == (3, 2)
    assert flat(extraction.text) == flat(f"{prose(1)} {prose(2)}")


def test_without_clean_the_text_is_unchanged(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["plain"], clean=False, engines=["pypdf2"])
    assert len(extraction.text) == extraction.characters_raw
    assert [line.strip() for line in extraction.text.split("\n")][:2] == prose(1).split("\n")[:2]


@pytest.mark.parametrize(
    ("name", "reason", "outcome"),
    [
        ("password", "encrypted", "encrypted"),
        ("truncated", "damaged", "damaged"),
        ("no_pdf", "damaged", "damaged"),
        ("empty", "damaged", "damaged"),
        ("scan", "no_text_layer", "complete"),
    ],
)
def test_a_pdf_without_text_is_left_out_with_a_reason(
    extractions: dict[str, Extraction], name: str, reason: str, outcome: str
) -> None:
    extraction = extractions[name]
    assert (extraction.reason, extraction.text, extraction.engine) == (reason, "", None)
    assert extraction.attempts == {"pypdf2": outcome, "pdfium": outcome}


def test_a_short_text_is_left_out(extractions: dict[str, Extraction], pdfs: dict[str, Path]) -> None:
    extraction = extractions["short"]
    assert (extraction.reason, extraction.text) == ("too_short", "")
    assert extraction.characters_raw >= len("Sea level")
    assert read(pdfs["short"], min_characters=len("Sea level")).text == "Sea level"


def test_a_blank_password_opens_the_document(extractions: dict[str, Extraction]) -> None:
    extraction = extractions["blank_password"]
    assert (extraction.reason, extraction.engine) == (None, "pdfium")
    assert flat(extraction.text) == flat(prose(9))


def test_a_damaged_page_does_not_stop_the_next_page(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["one_bad_page"], engines=["pypdf2"])
    assert (extraction.reason, extraction.attempts) == (None, {"pypdf2": "damaged"})
    assert (extraction.num_pages, extraction.pages_read) == (3, 3)
    assert flat(extraction.text) == flat(f"{prose(6)} {prose(7)}")


def test_a_complete_engine_is_preferred_to_a_damaged_one(extractions: dict[str, Extraction]) -> None:
    extraction = extractions["one_bad_page"]
    assert extraction.engine == "pdfium"
    assert extraction.attempts == {"pypdf2": "damaged", "pdfium": "complete"}


def test_an_engine_that_hangs_is_killed_and_the_next_engine_reads(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["hanging"], timeout_s=SHORT_TIMEOUT_S)
    assert extraction.attempts == {"pypdf2": "timed_out", "pdfium": "complete"}
    assert (extraction.engine, extraction.pages_read) == ("pdfium", 3)
    assert flat(extraction.text) == flat(f"{prose(4)} {prose(5)}")


def test_a_document_that_hangs_on_its_first_page_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "hanging.pdf"
    file.write_bytes(hanging_pdf())
    extraction = read(file, engines=["pypdf2"], timeout_s=SHORT_TIMEOUT_S)
    assert (extraction.reason, extraction.text, extraction.pages_read) == ("timed_out", "", 0)


@pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])
def test_a_bomb_stops_at_the_memory_limit_and_the_next_document_is_read(pdfs: dict[str, Path], engine: str) -> None:
    files = [pdfs["bomb"], pdfs["plain"]]
    (_, bomb), (_, plain) = extract_files(files, engines=[engine])
    assert bomb.reason in ("out_of_memory", "crashed")
    assert bomb.attempts == {engine: bomb.reason}
    assert (plain.reason, plain.pages_read) == (None, 3)


def test_results_and_order_do_not_depend_on_the_number_of_workers(pdfs: dict[str, Path], tmp_path: Path) -> None:
    large = write_pdf(tmp_path / "large.pdf", [prose(seed) for seed in range(40)])
    files = [large, *(pdfs[name] for name in ("no_pdf", "plain", "short", "password", "one_bad_page", "scan"))]
    one, two = (extract_files(files, max_pages=40, num_workers=number) for number in (1, 2))
    assert [file for file, _ in two] == files
    assert one == two


def test_a_killed_process_is_reported_in_one_line(pdfs: dict[str, Path]) -> None:
    sources = {Source(pdfs[name]): file_sha256(pdfs[name]) for name in ("plain", "hanging")}
    results = extract(Path(), sources, EXTRACT_SETTINGS, num_workers=2)
    next(results)
    for process in active_children():
        process.kill()

    with pytest.raises(InputError, match="A worker process was killed"):
        list(results)


def test_no_files_result_in_no_extractions() -> None:
    assert extract_files([]) == []


def test_a_document_that_hangs_on_page_20_keeps_19_pages(tmp_path: Path) -> None:
    file = tmp_path / "hangs.pdf"
    file.write_bytes(hanging_pdf(*(prose(number) for number in range(19))))

    extraction = read(file, engines=["pypdf2"], timeout_s=SHORT_TIMEOUT_S)

    assert (extraction.num_pages, extraction.pages_read, extraction.reason) == (20, 19, None)
    assert extraction.attempts == {"pypdf2": "timed_out"}
    assert flat(extraction.text) == flat(" ".join(prose(number) for number in range(19)))


def test_at_most_num_waiting_tasks_wait() -> None:
    sources = {Source(Path(f"{number}.pdf")): str(number) for number in range(21)}
    submitted: list[Future[Any]] = []

    def submit(source: Source, sha256: str) -> Future[Any]:
        submitted.append(Future())
        if len(submitted) % 3 == 0:
            for future in submitted[-3:]:
                future.set_result(sha256)
        return submitted[-1]

    num_waiting, results = [], []
    for source, _ in run_all(submit, sources, 3):
        num_waiting.append(len(submitted) - len(results))
        results.append(source)
    assert sorted(results, key=str) == sorted(sources, key=str)
    assert max(num_waiting) == 3


def test_mutated_pdfs(tmp_path: Path) -> None:
    assert fuzz_pdfs(tmp_path / "pdfs", 40, seed=7, num_workers=1).startswith("fuzz: 40 PDFs")
