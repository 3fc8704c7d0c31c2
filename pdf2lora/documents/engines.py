"""The PDF engines. Each opens a file and reads the text of single pages."""

from collections.abc import Callable
from pathlib import Path

PageReader = Callable[[int], str]  # page number, from 0 -> text


class Encrypted(Exception):
    """The document needs a password, or a cipher that the engine does not have."""


def _open_pypdf2(file: Path) -> tuple[int, PageReader]:
    import PyPDF2

    reader = PyPDF2.PdfReader(file)
    if reader.is_encrypted:
        try:
            is_open = reader.decrypt("")  # many documents only restrict printing and open with a blank password
        except Exception as error:
            raise Encrypted from error
        if not is_open:
            raise Encrypted
    return len(reader.pages), lambda number: reader.pages[number].extract_text()


def _open_pdfium(file: Path) -> tuple[int, PageReader]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower() or "security" in str(error).lower():
            raise Encrypted from error
        raise

    def read_page(number: int) -> str:
        page = document[number]
        text: str = page.get_textpage().get_text_bounded()
        page.close()
        return text

    return len(document), read_page


# engine name -> function that opens a file; it returns the number of pages and a page reader
ENGINES: dict[str, Callable[[Path], tuple[int, PageReader]]] = {"pypdf2": _open_pypdf2, "pdfium": _open_pdfium}
