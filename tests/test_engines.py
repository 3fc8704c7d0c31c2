from pathlib import Path

import pytest
from conftest import prose

from pdf2lora.documents.engines import ENGINES, Encrypted

BOTH = pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])


@BOTH
def test_an_engine_reads_single_pages(pdfs: dict[str, Path], engine: str) -> None:
    num_pages, read_page = ENGINES[engine](pdfs["plain"])
    assert num_pages == 3
    assert [read_page(number).split() for number in (2, 0)] == [prose(3).split(), prose(1).split()]


@BOTH
def test_a_document_with_a_password_is_encrypted(pdfs: dict[str, Path], engine: str) -> None:
    with pytest.raises(Encrypted):
        ENGINES[engine](pdfs["password"])


@BOTH
def test_a_blank_password_opens_a_document(pdfs: dict[str, Path], engine: str) -> None:
    _, read_page = ENGINES[engine](pdfs["blank_password"])
    assert read_page(0).split() == prose(9).split()


@BOTH
@pytest.mark.parametrize("name", ["truncated", "no_pdf", "empty"])
def test_a_damaged_file_raises_another_error(pdfs: dict[str, Path], engine: str, name: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (PyPDF2 raises more than a dozen types)
        ENGINES[engine](pdfs[name])
    assert not isinstance(caught.value, Encrypted)
