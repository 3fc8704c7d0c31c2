"""The PDFs of the corpus: how many there are, and how many pages."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from pdf2lora.documents.archives import DamagedMember
from pdf2lora.documents.sources import Listing, Source, local_file
from pdf2lora.preflight.findings import Finding

MAX_OPENED_PDFS = 200  # their pages are counted; the pages of the other PDFs are extrapolated
COUNT_TIMEOUT_S = 10


def corpus(folder: Path, listing: Listing) -> list[Finding]:
    """Checks that the folder has PDFs. Lists the files that extract will not read."""
    notes = [Finding("note", "corpus", sentence) for sentence in listing.unread]
    if not listing.sources:
        return [Finding("problem", "corpus", f"{folder} has no file that ends in .pdf"), *notes]
    sizes = [
        (folder / source.path).stat().st_size if source.member is None else source.member.packed_bytes
        for source in listing.sources
    ]
    num_members = sum(source.member is not None for source in listing.sources)
    text = f"{folder}: {len(sizes):,} PDFs, {sum(sizes) / 2**20:,.1f} MiB"
    return [Finding("ok", "corpus", text + (f"; {num_members:,} in archives" if num_members else "")), *notes]


def count_pages(folder: Path, sources: Sequence[Source], max_pages: int) -> int:
    """Number of pages that extract will read. pdfium counts in a child process, because a hostile PDF may crash it.

    max_pages: of each document.
    """
    readable = [source for source in sources if source.member is None or source.member.reason is None]
    opened = readable[:: max(1, len(readable) // MAX_OPENED_PDFS)]
    code = (
        "import sys, pypdfium2\n"
        "for file in sys.argv[2:]:\n"
        "    try: print(min(int(sys.argv[1]), len(pypdfium2.PdfDocument(file))), flush=True)\n"
        "    except pypdfium2.PdfiumError: print(0, flush=True)\n"
    )
    with ExitStack() as copies:
        files = []
        for source in opened:
            with suppress(DamagedMember):
                files.append(copies.enter_context(local_file(str(folder), source)))
        command = [sys.executable, "-c", code, str(max_pages), *map(str, files)]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S).stdout
        except subprocess.TimeoutExpired as expired:
            output = (expired.stdout or b"").decode()
    pages = [int(line) for line in output.split()]
    return round(sum(pages) * len(readable) / max(1, len(pages)))
