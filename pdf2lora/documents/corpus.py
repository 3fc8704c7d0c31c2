"""A folder of PDFs -> one record for each PDF. Earlier extractions of the same bytes are reused."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdf2lora.documents.extraction import extract
from pdf2lora.documents.records import COMPLETE, Document, Extraction, Reason
from pdf2lora.documents.text import text_sha256
from pdf2lora.errors import InputError
from pdf2lora.runtime.files import atomic_write, file_sha256


def find_pdfs(folder: Path) -> list[Path]:
    """All PDFs of a corpus, also in sub-folders, sorted by path.

    Raises:
        InputError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
    if not files:
        raise InputError(
            f"corpus: {folder} holds no file that ends in .pdf; put your PDFs there or choose another corpus"
        )
    return files


def extract_corpus(folder: Path, files: Sequence[Path], cache: Path, settings: Mapping[str, Any]) -> list[Document]:
    """One Document for each file, in the order of `files`.

    folder: of the corpus; ids are paths within it.
    cache: a folder for finished extractions. A PDF whose bytes are in it is not read again.
    settings: the section `extract` of params.yaml.

    Raises:
        InputError: a PDF changes while it is read.
    """
    hashes = {file: file_sha256(file) for file in files}
    by_hash = {sha256: file for file, sha256 in reversed(hashes.items())}  # one file for each content
    extractions = _extract_cached(by_hash, cache, settings)
    documents = []
    seen: set[str] = set()
    for file in files:
        extraction = extractions[hashes[file]]
        reason, text = extraction.reason, extraction.text
        if reason is None:
            key = text_sha256(text)
            reason, text = (Reason.DUPLICATE, "") if key in seen else (None, text)  # the first one is kept
            seen.add(key)
        fields = asdict(extraction) | {"reason": reason, "text": text}
        document_id = os.fsencode(file.relative_to(folder)).decode("utf-8", "backslashreplace")
        documents.append(Document(id=document_id, sha256=hashes[file], characters=len(text), **fields))
    return documents


def _extract_cached(files: Mapping[str, Path], cache: Path, settings: Mapping[str, Any]) -> dict[str, Extraction]:
    """sha256 -> extraction. Each new one is written to `cache` at once, so an interrupted stage loses nothing."""
    extractions = {}
    for sha256 in files:
        cached = cache / f"{sha256}.json"
        if cached.exists():
            extractions[sha256] = Extraction(**json.loads(cached.read_text(encoding="utf-8")))
    missing = {file: sha256 for sha256, file in files.items() if sha256 not in extractions}
    progress = tqdm(extract(missing, **settings), total=len(missing), desc="extract", unit="pdf", disable=None)
    for file, extraction in progress:
        if not file.exists() or file_sha256(file) != missing[file]:
            raise InputError(f"{file}: changed while it was read; wait until its writer has finished, then run again")
        if Reason.CRASHED not in extraction.attempts.values():  # a crash can be the fault of the machine
            with atomic_write(cache / f"{missing[file]}.json") as partial:
                partial.write_text(json.dumps(asdict(extraction), ensure_ascii=False), encoding="utf-8")
        extractions[missing[file]] = extraction
    return extractions


def summarize(documents: Sequence[Document]) -> dict[str, Any]:
    """The content of metrics/extract.json."""
    kept = [document for document in documents if document.reason is None]
    return {
        "documents": len(documents),
        "kept": len(kept),
        "left_out": dict(sorted(Counter(str(d.reason) for d in documents if d.reason is not None).items())),
        "engine": dict(sorted(Counter(str(d.engine) for d in kept).items())),
        "partial": sum(d.attempts[str(d.engine)] != COMPLETE for d in kept),
        "pages_read": sum(d.pages_read for d in kept),
        "characters_raw": sum(d.characters_raw for d in kept),
        "characters": sum(d.characters for d in kept),
    }
