"""The PDFs of the corpus: how many there are, and how many pages."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pdf2lora.preflight.findings import Finding

MAX_OPENED_PDFS = 200  # of which pages are counted; the rest is extrapolated
COUNT_TIMEOUT_S = 10


def find_pdfs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".pdf")


def corpus(folder: Path, pdfs: Sequence[Path]) -> Finding:
    """Whether the folder has PDFs."""
    if not pdfs:
        return Finding("problem", "corpus", f"{folder} has no file that ends in .pdf")
    mebibytes = sum(pdf.stat().st_size for pdf in pdfs) / 2**20
    return Finding("ok", "corpus", f"{folder}: {len(pdfs):,} PDFs, {mebibytes:,.1f} MiB")


def count_pages(files: Sequence[Path], max_pages: int) -> int:
    """Pages that extract will read. pdfium counts them in a child process, because a hostile PDF may crash it.

    max_pages: of each document.
    """
    opened = files[:: max(1, len(files) // MAX_OPENED_PDFS)]
    code = (
        "import sys, pypdfium2\n"
        "for file in sys.argv[2:]:\n"
        "    try: print(min(int(sys.argv[1]), len(pypdfium2.PdfDocument(file))), flush=True)\n"
        "    except pypdfium2.PdfiumError: print(0, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(max_pages), *map(str, opened)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S).stdout
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode()
    pages = [int(line) for line in output.split()]
    return round(sum(pages) * len(files) / max(1, len(pages)))
