"""The PDF engines. Each one opens a file and reads the text of single pages."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdf2lora.documents.columns import Box, column_order, union
from pdf2lora.documents.paragraphs import (
    continues_row,
    is_drop_cap,
    is_raised,
    order_of_vertical_lines,
    paragraph_starts,
)

SPACE = 0.1  # times the height of a line: if the gap between two pieces of a row is wider, a space is written there
MAYBE_RAISED = re.compile(r"\S[\d+\-−–]*\d")
SUPERSCRIPTS = str.maketrans("0123456789+-−–", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻")
LINE_END = re.compile("\r\n|\n|(?<=\ufffe)(?!\r?\n)")  # pdfium writes U+FFFE for a hyphen at a line end
PROSE_LETTERS = 8  # in a column of prose, a line has at least 8 letters
PROSE_SHARE = 0.8  # in at least 80% of the lines


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
    if form_type == pypdfium2.raw.FORMTYPE_ACRO_FORM:
        document.init_forms()

    def read_page(number: int) -> Page:
        page = document[number]
        try:
            text_page = page.get_textpage()
            text, is_reordered = _text_in_reading_order(text_page)
            return Page("\n".join([text, *_form_values(document, page), *_typed_texts(page)]), is_reordered)
        finally:
            page.close()

    return OpenFile(
        num_pages,
        read_page,
        is_placeholder=_is_xfa_placeholder(document, form_type),
        num_attachments=document.count_attachments(),
    )


def _text_in_reading_order(text_page: Any) -> tuple[str, bool]:
    boxes = [Box(*text_page.get_rect(number)) for number in range(text_page.count_rects())]
    order = column_order(boxes)
    if order is None:
        return _text_with_gaps(text_page), False
    lines = [text_page.get_text_bounded(*union([boxes[piece] for piece in pieces])) for pieces in order]
    num_prose_lines = sum(sum(map(str.isalpha, line)) >= PROSE_LETTERS for line in lines)
    if num_prose_lines < PROSE_SHARE * len(lines):  # the lines of a table of contents are also full, but of dots
        return _text_with_gaps(text_page), False
    return "\n".join(lines), True


def _text_with_gaps(text_page: Any) -> str:
    """Returns the text with a blank line before each paragraph that has a vertical gap or an indent above it."""
    from pypdfium2 import raw

    text = str(text_page.get_text_range())
    bounded = str(text_page.get_text_bounded())
    if len("".join(text.split())) != len("".join(bounded.split())):
        return bounded  # text outside of the page shifts the indices of characters

    def letter(index: int) -> Box:
        return Box(*text_page.get_charbox(raw.FPDFText_GetCharIndexFromTextIndex(text_page, index), loose=True))

    text = _with_superscripts(text, letter)
    lines = LINE_END.split(text)
    starts = [0, *(match.end() for match in LINE_END.finditer(text))]
    ends = [start + len(line.rstrip()) - 1 for start, line in zip(starts, lines, strict=True)]
    first_letters, last_letters = (
        [letter(index) if line.strip() else None for index, line in zip(indices, lines, strict=True)]
        for indices in (starts, ends)
    )
    order = order_of_vertical_lines(first_letters, last_letters)
    lines = [lines[number] for number in order]
    first_letters, last_letters = ([boxes[number] for number in order] for boxes in (first_letters, last_letters))
    is_start = paragraph_starts(first_letters)
    result = [lines[0]]
    for number, line in enumerate(lines[1:], 1):
        first, last, box = first_letters[number - 1], last_letters[number - 1], first_letters[number]
        above = result[-1].strip()
        if first and box and len(above) == 1 and above.isupper() and is_drop_cap(first, box):
            result[-1] = above + line
        elif first and last and box and continues_row(first, last, box):
            gap = " " if box.left - last.right > SPACE * (box.top - box.bottom) else ""
            result[-1] = result[-1].rstrip() + gap + line
        elif is_start[number] and not line.lstrip()[:1].islower():
            result += ["", line]
        else:
            result.append(line)
    return "\n".join(result)


def _with_superscripts(text: str, letter: Callable[[int], Box]) -> str:
    """Returns the text with raised digits and signs as superscripts: 10³, m⁻², and footnote marks. Subscripts stay.

    letter: index in the text -> the box of this character, as high as its font.
    """
    characters = list(text)
    for match in MAYBE_RAISED.finditer(text):
        base = letter(match.start())
        for index in range(match.start() + 1, match.end()):
            box = letter(index)
            if is_raised(base, box):
                characters[index] = text[index].translate(SUPERSCRIPTS)
            else:
                base = box
    return "".join(characters)


def _form_values(document: Any, page: Any) -> list[str]:
    """Returns the values of the text and choice fields of a page. They are not in the text of the page."""
    from pypdfium2 import raw

    values = []
    for annotation in _annotations(page) if document.formenv else ():
        field_type = raw.FPDFAnnot_GetFormFieldType(document.formenv, annotation)
        if field_type in (raw.FPDF_FORMFIELD_TEXTFIELD, raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX):
            values.append(_read_string(raw.FPDFAnnot_GetFormFieldValue, document.formenv, annotation))
    return [value for value in values if value]


def _typed_texts(page: Any) -> list[str]:
    """Returns the texts that a reader typed on a page. They are annotations, not in the text of the page."""
    from pypdfium2 import raw

    texts = [
        _read_string(raw.FPDFAnnot_GetStringValue, annotation, b"Contents")
        for annotation in _annotations(page)
        if raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_FREETEXT
        and not raw.FPDFAnnot_GetFlags(annotation) & raw.FPDF_ANNOT_FLAG_HIDDEN
    ]
    return [text for text in texts if text]


def _annotations(page: Any) -> Iterator[Any]:
    from pypdfium2 import raw

    for number in range(raw.FPDFPage_GetAnnotCount(page)):
        annotation = raw.FPDFPage_GetAnnot(page, number)
        yield annotation
        raw.FPDFPage_CloseAnnot(annotation)


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
