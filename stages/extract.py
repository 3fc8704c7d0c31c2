"""extract: data/pdfs/<corpus>/ -> data/documents.jsonl, metrics/extract.json

Writes one record per PDF: its text, or the reason why it is left out.
"""

import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from pdf2lora.cluster.extraction import extract_on_cluster
from pdf2lora.documents import ocr
from pdf2lora.documents.corpus import extract_corpus, summarize
from pdf2lora.documents.extraction import PACKAGES, extract
from pdf2lora.documents.records import write_through
from pdf2lora.documents.sources import list_corpus, require_sources
from pdf2lora.errors import InputError
from pdf2lora.params import read_params
from pdf2lora.paths import CORPORA, DOCUMENTS
from pdf2lora.runtime.files import atomic_write, write_json
from pdf2lora.runtime.processes import stage_main
from pdf2lora.runtime.scratch import fingerprint, scratch_folder, stage_code

METRICS = Path("metrics/extract.json")


@stage_main
def main() -> None:
    began = time.monotonic()
    params = read_params()
    folder = CORPORA / params.corpus
    listing = list_corpus(folder)
    require_sources(folder, listing)
    print(f"extract: {len(listing.sources)} PDFs in {folder}", flush=True)
    for sentence in listing.unread:
        print(f"extract: {sentence}")

    versions = [version(name) for name in PACKAGES]
    ocr_version = require_ocr(params.extract.ocr)
    cache = scratch_folder("extract", fingerprint(params.extract, *stage_code("extract"), *versions, ocr_version))
    run = extract
    if params.cluster.scheduler != "local":
        run = partial(extract_on_cluster, params.cluster.scheduler, params.cluster.corpus)
    documents = extract_corpus(folder, listing.sources, cache, params.extract, run)
    with atomic_write(DOCUMENTS) as partial_file:
        metrics = summarize(write_through(partial_file, documents))
        left_out = ", ".join(f"{count} {reason}" for reason, count in metrics["left_out"].items()) or "none"
        if not metrics["kept"]:
            raise InputError(
                f"{folder}: none of the {metrics['documents']} PDFs is usable ({left_out}). Add PDFs with a text layer."
            )
    write_json(METRICS, metrics)
    print(
        f"extract: {metrics['kept']} of {metrics['documents']} PDFs kept, {metrics['pages_read']} pages, "
        f"{metrics['characters']:,} characters, {time.monotonic() - began:.1f} s; left out: {left_out}"
    )
    if metrics["pages_unread"]:
        print(
            f"extract: {metrics['pages_unread']} pages after the first {params.extract.max_pages} of a document "
            "are not read (extract.max_pages)"
        )


def require_ocr(setting: str) -> str | None:
    """Returns the versions of the OCR packages; None if OCR is off.

    Raises InputError if the setting needs a package that is not installed.
    """
    versions = None if setting == "none" else ocr.installed_version()
    if setting == "rapidocr" and versions is None:
        raise InputError(
            "extract.ocr is rapidocr; rapidocr or onnxruntime is not installed. "
            "Run pip install -r requirements-ocr.txt, or set it to none."
        )
    if setting == "auto" and versions is None:
        print("extract: OCR is off, scanned pages have no text (pip install -r requirements-ocr.txt turns it on)")
    return versions


if __name__ == "__main__":
    main()
