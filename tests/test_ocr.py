"""OCR. Most tests need the packages of requirements-ocr.txt."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pypdfium2
import pytest
from helpers import prose
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas
from tiny_pdfs import extract_files, write_pdf, write_scan

from pdf2lora.documents import ocr

NEEDS_OCR = pytest.mark.skipif(ocr.installed_version() is None, reason="needs requirements-ocr.txt")


def scan_of(source: Path, target: Path) -> Path:
    """Makes a PDF whose pages are pictures of the pages of another PDF."""
    canvas = Canvas(str(target), invariant=1)
    with pypdfium2.PdfDocument(source) as document:
        for page in document:
            canvas.drawImage(ImageReader(page.render(scale=200 / 72).to_pil()), 0, 0, *page.get_size())
            canvas.showPage()
    canvas.save()
    return target


def error_rate(text: str, reference: str) -> float:
    """Returns the edit distance per character of the reference."""
    row = list(range(len(reference) + 1))
    for count, character in enumerate(text, 1):
        previous, row[0] = row[0], count
        for position, expected in enumerate(reference, 1):
            previous, row[position] = (
                row[position],
                min(row[position] + 1, row[position - 1] + 1, previous + (character != expected)),
            )
    return row[-1] / len(reference)


def test_a_missing_package_turns_ocr_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ocr, "version", version)
    assert ocr.installed_version() is None


def test_pieces_of_a_line_are_joined_from_left_to_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boxes(*corners: tuple[int, int, int, int]) -> Any:
        return np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in corners], dtype=float)

    pieces = boxes((300, 52, 400, 70), (10, 50, 290, 71), (10, 20, 400, 40))
    result = SimpleNamespace(boxes=pieces, txts=("melts", "and the ice", "The sea rises"))
    monkeypatch.setattr(ocr, "_engine", lambda: lambda image: result)
    page = ocr.open_ocr(write_pdf(tmp_path / "a.pdf", ["text"])).read_page(0)
    assert page.text == "The sea rises\nand the ice melts"


def test_a_blank_page_needs_no_ocr(tmp_path: Path) -> None:
    assert ocr.open_ocr(write_pdf(tmp_path / "a.pdf", [""])).read_page(0).text == ""


@NEEDS_OCR
def test_a_scan_is_read_with_few_errors(tmp_path: Path) -> None:
    scan = scan_of(write_pdf(tmp_path / "source.pdf", [prose(1), prose(2)]), tmp_path / "scan.pdf")
    [(_, extraction)] = extract_files([scan], ocr="rapidocr")
    assert (extraction.reason, extraction.engine, extraction.pages_ocr) == (None, "ocr", 2)
    expected = re.sub(r"\s+", " ", f"{prose(1)} {prose(2)}")
    assert error_rate(re.sub(r"\s+", " ", extraction.text), expected) < 0.02


@NEEDS_OCR
def test_only_the_pages_without_text_are_read_by_ocr(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "mixed.pdf"))
    canvas.drawString(72, 720, "The first page has a text layer that the engines read.")
    canvas.showPage()
    with pypdfium2.PdfDocument(write_pdf(tmp_path / "source.pdf", [prose(2)])) as source:
        canvas.drawImage(ImageReader(source[0].render(scale=200 / 72).to_pil()), 0, 0, *source[0].get_size())
    canvas.save()
    [(_, extraction)] = extract_files([tmp_path / "mixed.pdf"], ocr="rapidocr")
    assert (extraction.engine, extraction.pages_ocr) == ("pdfium", 1)
    assert extraction.attempts == {"pdfium": "complete", "pypdf2": "complete", "ocr": "complete"}
    assert "has a text layer" in extraction.text
    assert len(extraction.text) > len(prose(2))


@NEEDS_OCR
def test_ocr_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    scan = scan_of(write_pdf(tmp_path / "source.pdf", [prose(1)]), tmp_path / "scan.pdf")
    [(_, extraction)] = extract_files([scan], ocr="rapidocr", ocr_timeout_s=0.1)
    assert extraction.reason == "no_text_layer"


@NEEDS_OCR
def test_a_picture_without_text_stays_without_text(tmp_path: Path) -> None:
    [(_, extraction)] = extract_files([write_scan(tmp_path / "scan.pdf")], ocr="rapidocr")
    assert extraction.reason == "no_text_layer"
