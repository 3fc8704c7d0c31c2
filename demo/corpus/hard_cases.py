"""Makes PDFs without usable text: a scan, an incomplete download, a cover page."""

import io
from pathlib import Path

import pypdfium2
from PIL import Image
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

SCAN_DPI = 100


def make_scan(source: Path, target: Path) -> None:
    """Makes a scan: two grey JPEG pages, slightly rotated, without a text layer."""
    canvas = Canvas(str(target), pagesize=A4, invariant=1)
    with pypdfium2.PdfDocument(source) as document:
        for page in [document[0], document[1]]:
            picture = page.render(scale=SCAN_DPI / 72, grayscale=True).to_pil()
            jpeg = io.BytesIO()
            picture.rotate(0.4, resample=Image.Resampling.BICUBIC, fillcolor=255).save(jpeg, "JPEG", quality=40)
            canvas.drawImage(ImageReader(jpeg), 0, 0, *A4)
            canvas.showPage()
    canvas.save()


def make_broken(source: Path, target: Path) -> None:
    """Makes an incomplete download: the start of a file, without its page tree, text and cross-reference table."""
    data = source.read_bytes()
    target.write_bytes(data[: data.index(b"/Type /Pages")])


def make_cover(target: Path) -> None:
    """Makes the cover page of a report: too little text for a document."""
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
