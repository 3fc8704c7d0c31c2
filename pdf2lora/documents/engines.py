"""The PDF engines. Each one opens a file and reads the text of single pages."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdf2lora.documents.page_text import text_in_reading_order


class Encrypted(Exception):
    """The document needs a password, or the engine does not have its cipher."""


@dataclass(frozen=True)
class Page:
    text: str
    is_reordered: bool = False  # two columns were drawn row by row; the text is in reading order


@dataclass(frozen=True)
class OpenFile:
    num_pages: int
    read_page: Callable[[int], Page]  # page number, from 0
    is_placeholder: bool = False  # the page only asks for another viewer (XFA form)
    num_attachments: int = 0


def _open_pypdf2(file: Path) -> OpenFile:
    import PyPDF2

    reader = PyPDF2.PdfReader(file)
    if reader.is_encrypted:
        try:
            is_open = reader.decrypt("")  # many documents only restrict printing and open with a blank password
        except Exception as error:
            raise Encrypted from error
        if not is_open:
            raise Encrypted
    return OpenFile(len(reader.pages), lambda number: Page(reader.pages[number].extract_text()))


def _open_pdfium(file: Path) -> OpenFile:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower() or "security" in str(error).lower():
            raise Encrypted from error
        raise
    num_pages = len(document)
    form_type = document.get_formtype()
    if form_type in (pypdfium2.raw.FORMTYPE_ACRO_FORM, pypdfium2.raw.FORMTYPE_XFA_FOREGROUND):
        document.init_forms()

    def read_page(number: int) -> Page:
        page = document[number]
        try:
            text_page = page.get_textpage()
            text, is_reordered = text_in_reading_order(text_page)
            return Page("\n".join([text, *_form_values(document, page), *_typed_texts(page)]), is_reordered)
        finally:
            page.close()

    return OpenFile(
        num_pages,
        read_page,
        is_placeholder=_is_xfa_placeholder(document, form_type),
        num_attachments=document.count_attachments(),
    )


def _form_values(document: Any, page: Any) -> list[str]:
    """Returns the values of the visible text and choice fields of a page. They are not in the text of the page."""
    from pypdfium2 import raw

    values = []
    for annotation in _annotations(page) if document.formenv else ():
        field_type = raw.FPDFAnnot_GetFormFieldType(document.formenv, annotation)
        is_text = field_type in (raw.FPDF_FORMFIELD_TEXTFIELD, raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX)
        if is_text and not _is_hidden(annotation):
            values.append(_read_string(raw.FPDFAnnot_GetFormFieldValue, document.formenv, annotation))
    return [value for value in values if value]


def _typed_texts(page: Any) -> list[str]:
    """Returns the texts that a reader typed on a page. They are annotations, not in the text of the page."""
    from pypdfium2 import raw

    texts = [
        _read_string(raw.FPDFAnnot_GetStringValue, annotation, b"Contents")
        for annotation in _annotations(page)
        if raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_FREETEXT and not _is_hidden(annotation)
    ]
    return [text for text in texts if text]


def _annotations(page: Any) -> Iterator[Any]:
    from pypdfium2 import raw

    for number in range(raw.FPDFPage_GetAnnotCount(page)):
        annotation = raw.FPDFPage_GetAnnot(page, number)
        yield annotation
        raw.FPDFPage_CloseAnnot(annotation)


def _is_hidden(annotation: Any) -> bool:
    from pypdfium2 import raw

    return bool(raw.FPDFAnnot_GetFlags(annotation) & raw.FPDF_ANNOT_FLAG_HIDDEN)


def _read_string(function: Callable[..., int], *arguments: Any) -> str:
    """Calls a function of pdfium that writes a string in UTF-16 to a buffer and returns its number of bytes."""
    from pypdfium2 import raw

    num_bytes = function(*arguments, None, 0)
    buffer = ctypes.create_string_buffer(num_bytes)
    function(*arguments, ctypes.cast(buffer, ctypes.POINTER(raw.FPDF_WCHAR)), num_bytes)
    return buffer.raw.decode("utf-16-le", "replace").strip("\0 \r\n")


def _is_xfa_placeholder(document: Any, form_type: int) -> bool:
    """True for a dynamic XFA form. Its one page says "Please wait"; the form itself is XML that engines do not read.

    A static XFA form has the real pages, with form fields on them.
    """
    from pypdfium2 import raw

    if form_type == raw.FORMTYPE_XFA_FULL:
        return True
    return (
        form_type == raw.FORMTYPE_XFA_FOREGROUND and len(document) == 1 and not raw.FPDFPage_GetAnnotCount(document[0])
    )


# engine name -> function that opens a file
ENGINES: dict[str, Callable[[Path], OpenFile]] = {"pypdf2": _open_pypdf2, "pdfium": _open_pdfium}
