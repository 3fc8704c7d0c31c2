"""The documents that a pipeline must refuse or recognise: seven files, one small function each."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pypdfium2
from PIL import Image
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from demo.corpus.article import Article
from demo.corpus.layout import AGENCY, BULLETIN, JOURNAL, typeset

PASSWORD = "hectopascal"
SCAN_DPI = 100


def make_scan(source: Path, target: Path) -> None:
    """A paper copy laid on a scanner: two grey JPEG pages, slightly askew, without a text layer."""
    canvas = Canvas(str(target), pagesize=A4, invariant=1)
    with pypdfium2.PdfDocument(source) as document:
        for page in [document[0], document[1]]:
            picture = page.render(scale=SCAN_DPI / 72, grayscale=True).to_pil()
            jpeg = io.BytesIO()
            picture.rotate(0.4, resample=Image.Resampling.BICUBIC, fillcolor=255).save(jpeg, "JPEG", quality=40)
            canvas.drawImage(ImageReader(jpeg), 0, 0, *A4)
            canvas.showPage()
    canvas.save()


def make_encrypted(article: Article, target: Path) -> None:
    """A report behind a user password: no page can be read without it."""
    typeset(article, JOURNAL, target, password=PASSWORD)


def make_broken(source: Path, target: Path) -> None:
    """A download that stopped early: the first part of a file, without page tree, text or cross-reference table."""
    data = source.read_bytes()
    target.write_bytes(data[: data.index(b"/Type /Pages")])


def make_cover(target: Path) -> None:
    """The cover of a report whose body was published elsewhere: too few words to be a document."""
    canvas = Canvas(str(target), pagesize=A4, invariant=1)
    canvas.setTitle("Regional Climate Outlook")
    lines = {
        "Regional Climate Outlook": 26,
        "Summary for Planners": 18,
        "Volume 4: Rivers, Coasts and Towns": 13,
        "Prepared for the Standing Committee": 13,
        "on Water and Land": 13,
        "Revised draft, spring edition": 13,
    }
    text = canvas.beginText(90, 560)
    for line, size in lines.items():
        text.setFont("Liberation-Regular", size, leading=size * 1.7)
        text.textLine(line)
    canvas.drawText(text)
    canvas.save()


def make_exact_copy(source: Path, target: Path) -> None:
    """The same file downloaded twice: equal bytes under another name."""
    shutil.copyfile(source, target)


def make_second_edition(revised: Article, target: Path) -> None:
    """A lightly revised edition: new title, two new paragraphs, a few reworded sentences, another publisher's style."""
    typeset(revised, BULLETIN, target)


def make_unmapped(article: Article, target: Path) -> None:
    """Fine on screen, but its fonts have their own codes and no Unicode map: a reader gets "7KH" for "The"."""
    typeset(article, replace(AGENCY, family="Shifted"), target)
