"""extract: data/pdfs/<corpus>/ -> data/documents.jsonl, metrics/extract.json

Writes one record per PDF: its text, or the reason why it is left out.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from pdf2lora.documents import ocr
from pdf2lora.documents.corpus import extract_corpus, find_linked_folders, find_pdfs, summarize
from pdf2lora.documents.records import write_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import read_params
from pdf2lora.runtime.files import atomic_write, write_json
from pdf2lora.runtime.processes import single_instance
from pdf2lora.runtime.scratch import fingerprint, scratch_folder, stage_code

CORPORA = Path("data/pdfs")
DOCUMENTS = Path("data/documents.jsonl")
METRICS = Path("metrics/extract.json")


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    folder = CORPORA / params.corpus
    files = find_pdfs(folder)
    print(f"extract: {len(files)} PDFs in {folder}", flush=True)  # first, because the extraction can take long
    for link in find_linked_folders(folder):
        print(f"extract: the linked folder {link} is not read, because DVC does not track its files. Copy them.")

    settings = params.extract.model_dump()
    engine_versions = [version(name) for name in ("PyPDF2", "pypdfium2")]
    ocr_version = require_ocr(params.extract.ocr)
    cache = scratch_folder("extract", fingerprint(settings, *stage_code("extract"), *engine_versions, ocr_version))
    documents = extract_corpus(folder, files, cache, settings)
    metrics = summarize(documents)
    left_out = describe(metrics["left_out"])
    print(
        f"extract: {metrics['kept']} of {metrics['documents']} PDFs kept, {metrics['pages_read']} pages, "
        f"{metrics['characters']:,} characters; left out: {left_out}"
    )
    if metrics["pages_unread"]:
        print(
            f"extract: {metrics['pages_unread']} pages after the first {params.extract.max_pages} of a document "
            "are not read (extract.max_pages)"
        )
    if not metrics["kept"]:
        raise InputError(f"{folder}: none of the {len(files)} PDFs is usable ({left_out}). Add PDFs with a text layer.")

    with atomic_write(DOCUMENTS) as partial:
        write_documents(partial, documents)
    write_json(METRICS, metrics)


def require_ocr(setting: str) -> str | None:
    """Returns the versions of the OCR packages; None if OCR is off.

    Raises:
        InputError: the setting needs a package that is not installed.
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


def describe(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"


if __name__ == "__main__":
    main()
