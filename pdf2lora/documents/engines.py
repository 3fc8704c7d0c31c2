"""PDF engines: each opens a file and reads its pages one by one."""

from collections.abc import Callable
from pathlib import Path

PageReader = Callable[[int], str]


class Encrypted(Exception):
    """The document asks for a password, or for a cipher that the engine does not have."""


def _open_pypdf2(file: Path) -> tuple[int, PageReader]:
    import PyPDF2

    reader = PyPDF2.PdfReader(file)
    if reader.is_encrypted:
        try:
            opened = reader.decrypt("")  # many documents restrict printing and open without a password
        except Exception as error:
            raise Encrypted from error
        if not opened:
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


OPEN: dict[str, Callable[[Path], tuple[int, PageReader]]] = {"pypdf2": _open_pypdf2, "pdfium": _open_pdfium}
