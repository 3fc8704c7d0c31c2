from pathlib import Path

import matplotlib
import pytest
from helpers import prose
from PyPDF2 import PdfReader, PdfWriter
from PyPDF2.generic import (
    AnnotationBuilder,
    ArrayObject,
    DecodedStreamObject,
    DictionaryObject,
    NameObject,
    NumberObject,
    TextStringObject,
)
from pypdfium2 import PdfDocument
from pypdfium2.raw import FORMTYPE_XFA_FOREGROUND
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas
from tiny_pdfs import write_pdf

from pdf2lora.documents.engines import ENGINES, Encrypted

BOTH = pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])


@BOTH
def test_an_engine_reads_single_pages(pdfs: dict[str, Path], engine: str) -> None:
    document = ENGINES[engine](pdfs["plain"])
    assert document.num_pages == 3
    assert [document.read_page(number).text.split() for number in (2, 0)] == [prose(3).split(), prose(1).split()]


@BOTH
def test_a_document_with_a_password_is_encrypted(pdfs: dict[str, Path], engine: str) -> None:
    with pytest.raises(Encrypted):
        ENGINES[engine](pdfs["password"])


@BOTH
def test_a_blank_password_opens_a_document(pdfs: dict[str, Path], engine: str) -> None:
    document = ENGINES[engine](pdfs["blank_password"])
    assert document.read_page(0).text.split() == prose(9).split()


@BOTH
@pytest.mark.parametrize("name", ["truncated", "no_pdf", "empty"])
def test_a_damaged_file_raises_another_error(pdfs: dict[str, Path], engine: str, name: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (PyPDF2 raises more than a dozen types)
        ENGINES[engine](pdfs[name])
    assert not isinstance(caught.value, Encrypted)


def test_pdfium_reads_the_values_of_form_fields(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "form.pdf"))
    canvas.drawString(72, 720, "Name of the station:")
    canvas.acroForm.textfield(name="station", value="Upper valley", x=72, y=680, width=200, height=20)
    canvas.acroForm.textfield(name="remark", value="", x=72, y=640, width=200, height=20)
    canvas.acroForm.checkbox(name="seen", checked=True, x=72, y=600)
    canvas.save()
    page = ENGINES["pdfium"](tmp_path / "form.pdf").read_page(0)
    assert page.text.split("\n") == ["Name of the station:", "Upper valley"]


def test_pdfium_reads_the_fields_of_a_static_xfa_form_and_no_hidden_ones(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "form.pdf"))
    canvas.drawString(72, 720, "Name of the station:")
    canvas.acroForm.textfield(name="station", value="Upper valley", x=72, y=680, width=200, height=20)
    canvas.acroForm.textfield(name="id", value="8812", x=72, y=640, width=200, height=20, annotationFlags="hidden")
    canvas.save()
    writer = copy_of(tmp_path / "form.pdf")
    form = PdfReader(tmp_path / "form.pdf").trailer["/Root"]["/AcroForm"].clone(writer)
    form[NameObject("/Fields")] = ArrayObject(writer.pages[0].raw_get("/Annots"))
    xfa = DecodedStreamObject()
    xfa.set_data(b'<xdp:xdp xmlns:xdp="http://ns.adobe.com/xdp/"><template><subform/></template></xdp:xdp>')
    form[NameObject("/XFA")] = ArrayObject([TextStringObject("template"), writer._add_object(xfa)])
    writer._root_object[NameObject("/AcroForm")] = writer._add_object(form)
    writer.write(tmp_path / "xfa.pdf")
    assert PdfDocument(tmp_path / "xfa.pdf").get_formtype() == FORMTYPE_XFA_FOREGROUND
    page = ENGINES["pdfium"](tmp_path / "xfa.pdf").read_page(0)
    assert page.text.split("\n") == ["Name of the station:", "Upper valley"]


def test_pdfium_reads_texts_that_a_reader_typed_on_the_page(tmp_path: Path) -> None:
    writer = copy_of(write_pdf(tmp_path / "source.pdf", ["Name:"]))
    for text in ("Zoë Example", "only a link"):
        writer.add_annotation(0, AnnotationBuilder.free_text(text, rect=(72, 600, 300, 620)))
    [_, annotation] = writer.pages[0]["/Annots"]
    annotation.get_object()[NameObject("/F")] = NumberObject(2)  # hidden
    writer.write(tmp_path / "typed.pdf")
    page = ENGINES["pdfium"](tmp_path / "typed.pdf").read_page(0)
    assert page.text.split("\n") == ["Name:", "Zoë Example"]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_pdfium_separates_the_lines_of_rotated_text(tmp_path: Path, angle: int) -> None:
    canvas = Canvas(str(tmp_path / "rotated.pdf"), pagesize=(600, 600))
    canvas.translate(300, 300)
    canvas.rotate(angle)
    for row, line in enumerate(["The sea rises", "and the ice", "of the mountains melts."]):
        canvas.drawString(-200, 200 - 14 * row, line)
    canvas.save()
    page = ENGINES["pdfium"](tmp_path / "rotated.pdf").read_page(0)
    assert page.text.split() == ["The", "sea", "rises", "and", "the", "ice", "of", "the", "mountains", "melts."]


def draw_pieces(canvas: Canvas, y: float, *pieces: str) -> None:
    """One row; a piece that starts with ^ is raised and small, with _ lowered and small."""
    text = canvas.beginText(100, y)
    for piece in pieces:
        is_small = piece[0] in "^_"
        text.setFont("Helvetica", 7 if is_small else 12)
        text.setRise({"^": 5, "_": -3}.get(piece[0], 0))
        text.textOut(piece[is_small:])
    canvas.drawText(text)


def test_pdfium_continues_a_line_after_a_small_character(tmp_path: Path) -> None:
    """pdfium ends a line there. The rest of the row is neither a line nor a paragraph."""
    canvas = Canvas(str(tmp_path / "row.pdf"))
    draw_pieces(canvas, 700, "The oceans take up CO", "_2", ", and the")
    draw_pieces(canvas, 686, "land takes up CO", "_2", " more slowly.")
    canvas.drawString(100, 672, "A third line.")
    canvas.save()

    lines = ENGINES["pdfium"](tmp_path / "row.pdf").read_page(0).text.splitlines()

    expected = ["The oceans take up CO2, and the", "land takes up CO2 more slowly.", "A third line."]
    assert [line.rstrip() for line in lines] == expected


def test_pdfium_reads_raised_digits_as_superscripts(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "raised.pdf"))
    draw_pieces(
        canvas,
        700,
        "In 2001 it was 10",
        "^3",
        " W m",
        "^-2",
        " on 5 km",
        "^2",
        " of CO",
        "_2",
        ", says the report",
        "^12",
        ".",
    )
    draw_pieces(canvas, 686, "Decision 3/CMA.3", "^8", " has 25 pages and 1,000 words in A4.")
    canvas.save()

    lines = ENGINES["pdfium"](tmp_path / "raised.pdf").read_page(0).text.splitlines()

    assert [line.rstrip() for line in lines] == [
        "In 2001 it was 10³ W m⁻² on 5 km² of CO2, says the report¹².",
        "Decision 3/CMA.3⁸ has 25 pages and 1,000 words in A4.",
    ]


def copy_of(source: Path) -> PdfWriter:
    writer = PdfWriter()
    writer.append_pages_from_reader(PdfReader(source))
    return writer


def test_the_page_of_an_xfa_form_is_a_placeholder(tmp_path: Path) -> None:
    source = write_pdf(tmp_path / "source.pdf", ["Please wait"])
    form = DictionaryObject({NameObject("/XFA"): TextStringObject("<xdp/>"), NameObject("/Fields"): ArrayObject()})
    writer = copy_of(source)
    writer._root_object[NameObject("/AcroForm")] = form
    writer.write(tmp_path / "xfa.pdf")
    assert ENGINES["pdfium"](tmp_path / "xfa.pdf").is_placeholder
    assert not ENGINES["pdfium"](source).is_placeholder


def test_attachments_are_counted(tmp_path: Path) -> None:
    source = write_pdf(tmp_path / "source.pdf", ["Cover"])
    writer = copy_of(source)
    writer.add_attachment("report.pdf", source.read_bytes())
    writer.write(tmp_path / "portfolio.pdf")
    assert ENGINES["pdfium"](tmp_path / "portfolio.pdf").num_attachments == 1
    assert ENGINES["pdfium"](source).num_attachments == 0


def test_pdfium_reads_columns_drawn_row_by_row_in_reading_order(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "columns.pdf"))
    canvas.drawString(72, 800, "A title that is over both columns of this page and reaches from left to right")
    left, right = (prose(seed, 160).replace("\n", " ").split() for seed in (1, 2))
    columns = [[" ".join(words[start : start + 8]) for start in range(0, 160, 8)] for words in (left, right)]
    canvas.setFont("Helvetica", 9)
    for row, lines in enumerate(zip(*columns, strict=True)):
        for x, line in zip((72, 320), lines, strict=True):
            canvas.drawString(x, 760 - 12 * row, line)
    canvas.save()
    page = ENGINES["pdfium"](tmp_path / "columns.pdf").read_page(0)
    assert page.is_reordered
    assert page.text.split()[-320:] == left + right


def test_pdfium_puts_right_to_left_lines_in_reading_order(tmp_path: Path) -> None:
    pdfmetrics.registerFont(TTFont("DejaVu", Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"))
    canvas = Canvas(str(tmp_path / "hebrew.pdf"))
    canvas.setFont("DejaVu", 11)
    words = ["הזרימה", "בנהר", "בשנת", "2019", "לפי", "מודל", "HBV", "של", "האגן"]
    shown = [word if word.isascii() else word[::-1] for word in reversed(words)]  # as on the page, from left to right
    canvas.drawString(72, 720, " ".join(shown))
    canvas.save()
    assert ENGINES["pdfium"](tmp_path / "hebrew.pdf").read_page(0).text.split() == words


def test_a_drop_cap_belongs_to_the_first_word(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "cap.pdf"))
    canvas.setFont("Helvetica", 36)
    canvas.drawString(72, 720, "T")
    canvas.setFont("Helvetica", 11)
    for x, y, line in ((98, 737, "he sea rises and"), (98, 723, "the ice of the"), (72, 709, "mountains melts.")):
        canvas.drawString(x, y, line)
    canvas.save()
    text = ENGINES["pdfium"](tmp_path / "cap.pdf").read_page(0).text
    assert " ".join(text.split()) == "The sea rises and the ice of the mountains melts."


def test_a_capital_letter_above_a_paragraph_stays_alone(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "index.pdf"))
    canvas.setFont("Helvetica", 24)
    canvas.drawString(72, 720, "A")
    canvas.setFont("Helvetica", 11)
    for y, line in ((700, "aerosols, 12"), (686, "albedo, 7")):
        canvas.drawString(72, y, line)
    canvas.save()
    text = ENGINES["pdfium"](tmp_path / "index.pdf").read_page(0).text
    assert text.split() == ["A", "aerosols,", "12", "albedo,", "7"]


def test_pdfium_reads_blank_lines_between_paragraphs(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "paragraphs.pdf"))
    for y, line in ((760, "The sea"), (747, "rises."), (720, "The ice"), (707, "melts."), (694, "Slowly.")):
        canvas.drawString(72, y, line)
    canvas.save()
    text = ENGINES["pdfium"](tmp_path / "paragraphs.pdf").read_page(0).text
    assert [line.strip() for line in text.split("\n")] == ["The sea", "rises.", "", "The ice", "melts.", "Slowly."]


def write_rows(file: Path, *rows: tuple[str, ...], angle: int = 0) -> Path:
    canvas = Canvas(str(file))
    canvas.rotate(angle)
    if angle == 90:
        canvas.translate(0, -750)
    for row, pieces in enumerate(rows):
        draw_pieces(canvas, 700 - 14 * row, *pieces)
    canvas.save()
    return file


def lines_of(file: Path) -> list[str]:
    return [line.strip() for line in ENGINES["pdfium"](file).read_page(0).text.splitlines()]


def test_pdfium_reads_the_marks_of_several_footnotes(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "marks.pdf", ("says a report", "^1,2", " and one", "^3, 4", " of 1,000 in 2001, 2 or 3.")
    )
    assert lines_of(file) == ["says a report¹,² and one³, ⁴ of 1,000 in 2001, 2 or 3."]


def test_a_raised_digit_belongs_to_the_line_that_pdfium_ends_before_it(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "x.pdf",
        (
            "x",
            "^2",
            " is a square",
        ),
        ("5", "^2", " too"),
    )
    assert lines_of(file) == ["x² is a square", "5² too"]


def test_rotated_text_has_no_superscripts(tmp_path: Path) -> None:
    rows = ["The oceans take up CO2", "Table A12 shows H1N1"]
    assert lines_of(write_rows(tmp_path / "rotated.pdf", *((row,) for row in rows), angle=90)) == rows


def test_characters_of_two_utf_16_units_do_not_shift_the_positions(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "source.pdf", ("the set @ has x", "^2", "10 cells and y", "^10", "3"))
    writer = copy_of(source)
    unicode_map = DecodedStreamObject()
    unicode_map.set_data(
        b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfrange <20> <7E> <0020> endbfrange "
        b"1 beginbfchar <40> <D835DD38> endbfchar endcmap"
    )
    [font] = writer.pages[0]["/Resources"]["/Font"].values()
    font.get_object()[NameObject("/ToUnicode")] = writer._add_object(unicode_map)
    writer.write(tmp_path / "set.pdf")
    assert lines_of(tmp_path / "set.pdf") == ["the set 𝔸 has x²10 cells and y¹⁰3"]


def test_text_outside_of_the_page_is_not_read(tmp_path: Path) -> None:
    canvas = Canvas(str(tmp_path / "slug.pdf"))
    canvas.drawString(100, -20, "book.indb 12")
    draw_pieces(canvas, 700, "10", "^3", " W m", "^-2", " of CO", "_2", " in all")
    for y, line in ((686, "years."), (660, "The ice"), (646, "melts."), (632, "Slowly.")):
        canvas.drawString(100, y, line)
    canvas.save()
    assert lines_of(tmp_path / "slug.pdf") == ["10³ W m⁻² of CO2 in all", "years.", "", "The ice", "melts.", "Slowly."]


@pytest.mark.parametrize("lead", [9, 10, 12])
def test_columns_drawn_row_by_row_keep_superscripts_and_high_letters(tmp_path: Path, lead: int) -> None:
    canvas = Canvas(str(tmp_path / "columns.pdf"))
    for row, letter in enumerate("abcdefghijklmnop"):
        for x, side in ((50, "left"), (310, "right")):
            text = canvas.beginText(x, 760 - lead * row)
            for size, rise, piece in (
                (10, 0, f"{side} {letter} (by flow) of 10 km"),
                (7, 4, "2"),
                (10, 0, " [of Jog]"),
            ):
                text.setFont("Helvetica", size)
                text.setRise(rise)
                text.textOut(piece)
            canvas.drawText(text)
    canvas.save()
    expected = [
        f"{side} {letter} (by flow) of 10 km² [of Jog]" for side in ("left", "right") for letter in "abcdefghijklmnop"
    ]
    assert lines_of(tmp_path / "columns.pdf") == expected
