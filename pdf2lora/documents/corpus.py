"""A folder of PDFs -> one record per PDF. PDFs that were extracted before are read from a cache."""

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
    """Returns all PDFs of a corpus, sorted by path. Sub-folders are included, linked folders are not.

    Raises:
        InputError: the folder has no PDF.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
    if not files:
        remedy = " Linked folders are not read; copy their files." if find_linked_folders(folder) else ""
        raise InputError(f"corpus: {folder} has no .pdf file. Put PDFs there or select another corpus.{remedy}")
    return files


def find_linked_folders(folder: Path) -> list[Path]:
    """Returns the links to folders in a corpus. DVC does not track the files in them, so a corpus has none."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() and path.is_dir())


def extract_corpus(folder: Path, files: Sequence[Path], cache: Path, settings: Mapping[str, Any]) -> list[Document]:
    """Returns one Document per file, in the order of `files`.

    folder: the corpus folder. The id of a document is its path in this folder.
    cache: a folder of finished extractions, by SHA-256 of the PDF. A PDF in the cache is not read again.
    settings: the section `extract` of params.yaml.

    Raises:
        InputError: a PDF changed during the extraction.
    """
    hashes = {file: file_sha256(file) for file in files}
    by_hash = {sha256: file for file, sha256 in reversed(hashes.items())}  # the first file of each content
    extractions = _extract_with_cache(by_hash, cache, settings)
    documents = []
    known_texts: set[str] = set()
    for file in files:
        extraction = extractions[hashes[file]]
        reason, text = extraction.reason, extraction.text
        if reason is None:
            key = text_sha256(text)
            if key in known_texts:
                reason, text = Reason.DUPLICATE, ""
            known_texts.add(key)
        fields = asdict(extraction) | {"reason": reason, "text": text}
        document_id = os.fsencode(file.relative_to(folder)).decode("utf-8", "backslashreplace")
        documents.append(Document(id=document_id, sha256=hashes[file], characters=len(text), **fields))
    return documents


def _extract_with_cache(files: Mapping[str, Path], cache: Path, settings: Mapping[str, Any]) -> dict[str, Extraction]:
    """Returns SHA-256 -> extraction. Writes each new extraction at once, so that an interrupted stage loses nothing."""
    extractions = {}
    for sha256 in files:
        cached = cache / f"{sha256}.json"
        if cached.exists():
            extractions[sha256] = Extraction(**json.loads(cached.read_text(encoding="utf-8")))
    missing = {file: sha256 for sha256, file in files.items() if sha256 not in extractions}
    progress = tqdm(extract(missing, **settings), total=len(missing), desc="extract", unit="pdf", disable=None)
    for file, extraction in progress:
        if not file.exists() or file_sha256(file) != missing[file]:
            raise InputError(f"{file} changed during the extraction. Run again when no program writes to it.")
        if Reason.CRASHED not in extraction.attempts.values():  # the machine can be the cause of a crash
            with atomic_write(cache / f"{missing[file]}.json") as partial:
                partial.write_text(json.dumps(asdict(extraction), ensure_ascii=False), encoding="utf-8")
        extractions[missing[file]] = extraction
    return extractions


def summarize(documents: Sequence[Document]) -> dict[str, Any]:
    """Returns the content of metrics/extract.json."""
    kept = [document for document in documents if document.reason is None]
    return {
        "documents": len(documents),
        "kept": len(kept),
        "left_out": dict(sorted(Counter(str(d.reason) for d in documents if d.reason is not None).items())),
        "engine": dict(sorted(Counter(str(d.engine) for d in kept).items())),
        "partial": sum(d.attempts[str(d.engine)] != COMPLETE for d in kept),
        "pages_read": sum(d.pages_read for d in kept),
        "pages_unread": sum((d.num_pages or d.pages_read) - d.pages_read for d in kept),
        "pages_unreadable": sum(d.pages_unreadable for d in kept),
        "pages_ocr": sum(d.pages_ocr for d in kept),
        "pages_reordered": sum(d.pages_reordered for d in kept),
        "characters_raw": sum(d.characters_raw for d in kept),
        "characters": sum(d.characters for d in kept),
        "removed": dict(sorted(sum((Counter(d.removed) for d in kept), Counter[str]()).items())),
    }
