"""extract: data/pdfs/<corpus>/ -> data/documents.jsonl, metrics/extract.json

One record for every PDF, kept or left out with its reason. What was extracted before from the same bytes with the same
settings and code is taken from scratch: a PDF that is added to a corpus is the only one that is read.
"""

import json
import os
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdf2lora import cleaning, pdf
from pdf2lora.corpus import Document, text_sha256, write_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.orphans import after_orphans
from pdf2lora.params import read_params
from pdf2lora.runtime import file_sha256, fingerprint, scratch_folder, whole_file, write_json

CORPORA = Path("data/pdfs")
DOCUMENTS = Path("data/documents.jsonl")
METRICS = Path("metrics/extract.json")


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()
    files = find_pdfs(CORPORA / params.corpus)
    settings = params.extract.model_dump()
    print(
        f"extract: {len(files)} PDFs in {CORPORA / params.corpus}", flush=True
    )  # before the work, which may take long

    hashes = {file: file_sha256(file) for file in files}
    code = [Path(module.__file__ or "") for module in (pdf, cleaning)]
    cache = scratch_folder("extract", fingerprint(settings, *code, version("PyPDF2"), version("pypdfium2")))
    extractions = extract_cached({sha256: file for file, sha256 in reversed(hashes.items())}, cache, settings)
    documents = accounted([(file.relative_to(CORPORA / params.corpus), hashes[file]) for file in files], extractions)
    metrics = summary(documents)
    print(summary_line(metrics))
    if not metrics["kept"]:
        raise InputError(
            f"{CORPORA / params.corpus}: none of its {len(files)} PDFs can be used ({reasons_in_words(metrics)}); "
            "add PDFs with a text layer"
        )

    with whole_file(DOCUMENTS) as partial:
        write_documents(partial, documents)
    write_json(METRICS, metrics)


def find_pdfs(folder: Path) -> list[Path]:
    """All PDFs of a corpus, sub-folders too, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
    if not files:
        raise InputError(
            f"corpus: {folder} holds no file that ends in .pdf; put your PDFs there or choose another corpus"
        )
    return files


def extract_cached(files: dict[str, Path], cache: Path, settings: dict[str, Any]) -> dict[str, pdf.Extraction]:
    """sha256 -> extraction; each is put into `cache` at once, so an interrupted stage goes on from there."""
    extractions = {}
    for sha256 in files:
        cached = cache / f"{sha256}.json"
        if cached.exists():
            extractions[sha256] = pdf.Extraction(**json.loads(cached.read_text(encoding="utf-8")))
    missing = {file: sha256 for sha256, file in files.items() if sha256 not in extractions}
    for file, extraction in tqdm(
        pdf.extract(missing, **settings),
        total=len(missing),
        desc="extract",
        unit="pdf",
        disable=None,
    ):
        if not file.exists() or file_sha256(file) != missing[file]:
            raise InputError(f"{file}: changed while it was read; let what writes it come to its end, then run again")
        if pdf.Reason.CRASHED not in extraction.attempts.values():  # a crash may be the machine's: tried again
            with whole_file(cache / f"{missing[file]}.json") as partial:
                partial.write_text(json.dumps(asdict(extraction), ensure_ascii=False), encoding="utf-8")
        extractions[missing[file]] = extraction
    return extractions


def accounted(files: list[tuple[Path, str]], extractions: dict[str, pdf.Extraction]) -> list[Document]:
    """A Document for every file; of those with the same bytes or the same text the first one is kept."""
    documents = []
    seen: set[str] = set()
    for path, sha256 in files:
        extraction = extractions[sha256]
        reason, text = extraction.reason, extraction.text
        if reason is None:
            key = text_sha256(text)
            reason, text = (pdf.Reason.DUPLICATE, "") if key in seen else (None, text)
            seen.add(key)
        fields = asdict(extraction) | {"reason": reason, "text": text}
        documents.append(
            Document(
                id=os.fsencode(path).decode("utf-8", "backslashreplace"), sha256=sha256, characters=len(text), **fields
            )
        )
    return documents


def summary(documents: list[Document]) -> dict[str, object]:
    kept = [document for document in documents if document.reason is None]
    return {
        "documents": len(documents),
        "kept": len(kept),
        "left_out": dict(sorted(Counter(str(d.reason) for d in documents if d.reason is not None).items())),
        "engine": dict(sorted(Counter(str(d.engine) for d in kept).items())),
        "partial": sum(d.attempts[str(d.engine)] != pdf.COMPLETE for d in kept),
        "pages_read": sum(d.pages_read for d in kept),
        "characters_raw": sum(d.characters_raw for d in kept),
        "characters": sum(d.characters for d in kept),
    }


def reasons_in_words(metrics: dict[str, object]) -> str:
    left_out = metrics["left_out"]
    assert isinstance(left_out, dict)
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"


def summary_line(metrics: dict[str, object]) -> str:
    return (
        f"extract: {metrics['kept']} of {metrics['documents']} PDFs kept, {metrics['pages_read']} pages, "
        f"{metrics['characters']:,} characters; left out: {reasons_in_words(metrics)}"
    )


if __name__ == "__main__":
    main()
