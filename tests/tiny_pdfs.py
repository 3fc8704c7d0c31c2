"""Small PDFs, also damaged and hostile ones, and settings to extract them."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from pdf2lora.documents.extraction import extract
from pdf2lora.documents.records import Extraction
from pdf2lora.documents.sources import Source
from pdf2lora.params import Extract
from pdf2lora.runtime.files import file_sha256

EXTRACT_SETTINGS = Extract(
    engines=["pdfium", "pypdf2"],
    max_pages=30,
    timeout_s=20.0,
    memory_gib=0.5,
    clean=True,
    min_characters=100,
    ocr="none",
    ocr_timeout_s=60.0,
    ocr_memory_gib=4.0,
)


def extract_files(files: Iterable[Path], *, num_workers: int = 1, **changes: Any) -> list[tuple[Path, Extraction]]:
    """The extractions of some files, in their order; changes: of EXTRACT_SETTINGS."""
    settings = EXTRACT_SETTINGS.model_copy(update=changes)
    sources = {Source(file): file_sha256(file) for file in files}
    results = dict(extract(Path(), sources, settings, num_workers=num_workers))
    return [(source.path, results[source]) for source in sources]


def write_pdf(file: Path, pages: list[str], password: str | None = None) -> Path:
    """Writes a PDF with one string per page. A password encrypts it; an empty password too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    encryption = None if password is None else StandardEncryption(password, ownerPassword="owner", strength=128)
    canvas = Canvas(str(file), encrypt=encryption, invariant=1)
    for page in pages:
        text = canvas.beginText(72, 760)
        text.textLines(page)
        canvas.drawText(text)
        canvas.showPage()
    canvas.save()
    return file


def write_scan(file: Path) -> Path:
    """Writes a PDF with one page that is an image."""
    canvas = Canvas(str(file), invariant=1)
    canvas.drawImage(ImageReader(Image.new("RGB", (20, 20), "gray")), 50, 50, 400, 600)
    canvas.showPage()
    canvas.save()
    return file


def text_stream(text: str) -> bytes:
    """A PDF content stream that shows the lines of the text."""
    return (
        b"BT /F1 12 Tf 72 720 Td 14 TL "
        + b" ".join(b"(%s) Tj T*" % line.encode() for line in text.split("\n"))
        + b" ET"
    )


def raw_pdf(*contents: bytes, stream_filter: bytes = b"") -> bytes:
    """A PDF with one page per content stream, written byte by byte. A PDF library would refuse such streams."""
    page_numbers = range(4, 4 + 2 * len(contents), 2)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(b"%d 0 R" % n for n in page_numbers), len(contents)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, content in zip(page_numbers, contents, strict=True):
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (number + 1),
            b"<< %s/Length %d >>\nstream\n%s\nendstream" % (stream_filter, len(content), content),
        ]
    body, offsets = b"%PDF-1.4\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, value)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(
        b"%010d 00000 n \n" % o for o in offsets
    )
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(body))
    return body + table + trailer


def deflated_blanks(gib: int) -> bytes:
    """A zlib stream of so many GiB of spaces, about 1 MB per GiB. It repeats one compressed MiB."""
    deflate = zlib.compressobj(9)
    first, next_ = (deflate.compress(b" " * 2**20) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    size = gib * 2**30
    low, high = (1 + 32 * size) % 65521, (size + 32 * size * (size + 1) // 2) % 65521
    end_and_adler32 = b"\x03\x00" + (high << 16 | low).to_bytes(4, "big")
    return first + next_ * (gib * 1024 - 1) + end_and_adler32


def flate_bomb() -> bytes:
    """A PDF of 10 kB whose page has 4 GiB."""
    return raw_pdf(zlib.compress(deflated_blanks(4), 9), stream_filter=b"/Filter [/FlateDecode /FlateDecode] ")


def hanging_pdf(*pages_before: str) -> bytes:
    """A PDF whose last page ends in a comment without line end. PyPDF2 never stops reading it (CVE-2023-36464)."""
    return raw_pdf(*map(text_stream, pages_before), b"BT ET % x")
