"""Article -> PDF in one of four styles. The same article and style give the same bytes."""

import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reportlab import rl_config
from reportlab.lib.colors import HexColor
from reportlab.lib.enums import TA_JUSTIFY, TA_LEFT
from reportlab.lib.pagesizes import A4, letter
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import BaseDocTemplate, Flowable, Frame, KeepTogether, NextPageTemplate, PageTemplate, Spacer
from reportlab.platypus import Paragraph as Text
from reportlab.platypus import Table as Grid

from demo.corpus.article import Article, Bullets, Heading, Paragraph, Table

COLUMN_GAP = 18.0
CELL_PADDING = 4.0
TITLE_GAP = 18.0

rl_config.useA85 = 0  # binary streams, a fifth smaller


@dataclass(frozen=True)
class Style:
    """The style of one publisher. Lengths are in points."""

    family: str
    page_size: tuple[float, float]
    margin: float
    body_size: float
    leading: float  # in body sizes
    footer: str  # can contain {page}, {pages} and {running}
    footer_at: float = 0.5  # 0 left, 0.5 centre, 1 right
    accent: str = "#000000"  # colour of the title, headings and rules
    justified: bool = True  # justified text with hyphenation; otherwise left-aligned text without it
    indented: bool = True  # paragraphs start with an indent; otherwise with space above
    numbered: bool = True  # headings are "1  Introduction", unless the text has numbers
    ruled_header: bool = False


JOURNAL = Style("Gentium", A4, margin=70, body_size=10.5, leading=1.3, footer="– {page} –")
AGENCY = Style(
    "Carlito",
    letter,
    margin=72,
    body_size=10.5,
    leading=1.35,
    footer="Page {page} of {pages}",
    footer_at=1,
    accent="#1b4f72",
    justified=False,
    indented=False,
    numbered=False,
    ruled_header=True,
)
PREPRINT = Style("Charis", A4, margin=76, body_size=9.5, leading=1.25, footer="{page}", ruled_header=True)
BULLETIN = Style(
    "Liberation",
    letter,
    margin=76,
    body_size=11.5,
    leading=1.45,
    footer="{running}  |  {page}",
    footer_at=0,
    accent="#5b2c2c",
    indented=False,
    numbered=False,
)
STYLES = (JOURNAL, AGENCY, PREPRINT, BULLETIN)  # the number of a text selects one


def typeset(article: Article, style: Style, target: Path, password: str | None = None) -> int:
    """Writes the PDF and returns its number of pages. The layout runs twice, because footers show the total."""
    num_pages = build(article, style, io.BytesIO(), num_pages=0, password=None)
    with target.open("wb") as file:
        return build(article, style, file, num_pages, password)


def build(article: Article, style: Style, file: IO[bytes], num_pages: int, password: str | None) -> int:
    width, height = (length - 2 * style.margin for length in style.page_size)
    title = Text(markup(article.title), text_style(style, "Bold", 1.7, textColor=HexColor(style.accent)))
    _, title_height = title.wrap(width, height)
    num_columns = 2 if article.two_columns else 1
    column_width = (width - COLUMN_GAP * (num_columns - 1)) / num_columns

    def columns(column_height: float) -> list[Frame]:
        lefts = [style.margin + n * (column_width + COLUMN_GAP) for n in range(num_columns)]
        return [Frame(left, style.margin, column_width, column_height, 0, 0, 0, 0) for left in lefts]

    def draw_page(canvas: Canvas, doc: BaseDocTemplate) -> None:
        draw_header_and_footer(canvas, article, style, doc.page, num_pages)

    def draw_first_page(canvas: Canvas, doc: BaseDocTemplate) -> None:
        draw_page(canvas, doc)
        title.drawOn(canvas, style.margin, style.margin + height - title_height)

    first = PageTemplate("first", columns(height - title_height - TITLE_GAP), draw_first_page)
    other = PageTemplate("other", columns(height), draw_page)
    doc = BaseDocTemplate(
        file,
        pagesize=style.page_size,
        pageTemplates=[first, other],
        title=article.title,
        author="The pdf2lora demo corpus",
        invariant=1,
        encrypt=StandardEncryption(password, strength=128) if password else None,
    )
    doc.build([NextPageTemplate("other"), *flow(article, style, column_width)])
    return int(doc.page)


def draw_header_and_footer(canvas: Canvas, article: Article, style: Style, page: int, num_pages: int) -> None:
    width, height = style.page_size
    left, right, header = style.margin, width - style.margin, height - style.margin + 20
    canvas.setFont(f"{style.family}-Italic", style.body_size - 1.5)
    canvas.drawString(left, header, article.running)
    if style.ruled_header:
        canvas.setLineWidth(0.5)
        canvas.line(left, header - 6, right, header - 6)
    canvas.setFont(f"{style.family}-Regular", style.body_size - 1.5)
    footer = style.footer.format(page=page, pages=num_pages, running=article.running)
    spare = right - left - stringWidth(footer, f"{style.family}-Regular", style.body_size - 1.5)
    canvas.drawString(left + style.footer_at * spare, style.margin - 30, footer)


def flow(article: Article, style: Style, width: float) -> list[Flowable]:
    """Returns the blocks of an article as reportlab flowables."""
    size = style.body_size
    prose = {
        "alignment": TA_JUSTIFY if style.justified else TA_LEFT,
        "hyphenationLang": "en_GB" if style.justified else None,
    }
    body = text_style(style, **prose, spaceAfter=0 if style.indented else size * 0.6)
    follower = text_style(style, **prose, firstLineIndent=size * 1.4) if style.indented else body
    bullet = text_style(style, **prose, leftIndent=size * 1.4, spaceAfter=size * 0.25)
    color = HexColor(style.accent)
    heading = text_style(style, "Bold", 1.15, spaceBefore=9, spaceAfter=4, keepWithNext=1, textColor=color)

    headings = [block.words for block in article.blocks if isinstance(block, Heading)]
    numbered = style.numbered and not any(re.match(r"(\d+|[A-Z])\.", words) for words in headings)

    flowables: list[Flowable] = []
    num_headings = 0
    after_paragraph = False
    for block in article.blocks:
        match block:
            case Heading(words):
                num_headings += 1
                flowables.append(Text(markup(f"{num_headings}  {words}" if numbered else words), heading))
            case Paragraph(words):
                flowables.append(Text(markup(words), follower if after_paragraph else body))
            case Bullets(items):
                flowables += [Text(markup(item), bullet, bulletText="•") for item in items]
                flowables.append(Spacer(0, size * 0.35))
            case Table():
                flowables.append(table(block, style, width))
        after_paragraph = isinstance(block, Paragraph)
    return flowables


def table(block: Table, style: Style, width: float) -> Flowable:
    """Returns a table with rules above, below and under its head. Its caption stays on the same page."""
    cell, head = text_style(style, scale=0.87), text_style(style, "Bold", 0.87)
    caption = text_style(style, "Italic", 0.87, spaceBefore=3, spaceAfter=style.body_size * 0.9)
    rows = [[Text(markup(words), cell if n else head) for words in row] for n, row in enumerate(block.rows)]
    grid = Grid(rows, column_widths(block, head, width), spaceBefore=style.body_size * 0.6)
    everywhere, color = ((0, 0), (-1, -1)), HexColor(style.accent)
    grid.setStyle(
        [
            ("LINEABOVE", (0, 0), (-1, 0), 0.9, color),
            ("LINEBELOW", (0, 0), (-1, 0), 0.5, color),
            ("LINEBELOW", (0, -1), (-1, -1), 0.9, color),
            ("VALIGN", *everywhere, "TOP"),
            ("LEFTPADDING", *everywhere, CELL_PADDING),
            ("RIGHTPADDING", *everywhere, CELL_PADDING),
            ("TOPPADDING", *everywhere, 2),
            ("BOTTOMPADDING", *everywhere, 3),
        ]
    )
    return KeepTogether([grid, Text(markup(block.caption), caption)])


def column_widths(block: Table, widest: ParagraphStyle, width: float) -> list[float]:
    """Each column gets the width of its longest word. The rest is distributed by the lengths of the longest cells."""

    def measure(words: str) -> float:
        return float(stringWidth(words, widest.fontName, widest.fontSize)) + 2 * CELL_PADDING + 1

    columns = list(zip(*block.rows, strict=True))
    smallest = [max(measure(word) for words in column for word in words.split() or [""]) for column in columns]
    largest = [max(map(measure, column)) for column in columns]
    gaps = [high - low for high, low in zip(largest, smallest, strict=True)]
    share = (width - sum(smallest)) / max(sum(gaps), 1)
    return [low + share * gap for low, gap in zip(smallest, gaps, strict=True)]


def text_style(style: Style, weight: str = "Regular", scale: float = 1, **settings: object) -> ParagraphStyle:
    size = style.body_size * scale
    return ParagraphStyle(
        f"{style.family}-{weight}",
        fontName=f"{style.family}-{weight}",
        fontSize=size,
        leading=size * style.leading,
        bulletFontName=f"{style.family}-Regular",
        allowWidows=0,
        allowOrphans=0,
        **settings,
    )


def markup(words: str) -> str:
    """Converts plain text with `*emphasis*` to reportlab's XML."""
    return re.sub(r"\*([^*]+)\*", r"<i>\1</i>", html.escape(words, quote=False))
