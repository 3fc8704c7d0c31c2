"""The PDFs of a corpus -> one Document per PDF. The results of earlier runs are read from a cache."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdf2lora.documents.records import COMPLETE, Document, Extraction, Reason
from pdf2lora.documents.sources import Source, changed, corpus_state, hash_source
from pdf2lora.documents.text import text_sha256
from pdf2lora.params import Extract
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.parallel import num_cores

SUMMED = ("pages_unreadable", "pages_ocr", "pages_reordered", "characters_raw", "characters")  # fields of a Document

ExtractAll = Callable[[Path, Mapping[Source, str], Extract], Iterator[tuple[Source, Extraction]]]


def extract_corpus(
    folder: Path, sources: Sequence[Source], cache: Path, settings: Extract, run: ExtractAll
) -> Iterator[Document]:
    """Yields one Document per source, in the order of `sources`. Only the current text is in memory.

    folder: the corpus folder.
    cache: a folder of finished extractions, by SHA-256 of the PDF. A PDF in the cache is not read again.
    run: extraction.extract, or a function that does the same on other machines.

    Raises InputError if the corpus changed during the extraction.
    """
    state = corpus_state(folder)
    hashes = _hash_all(folder, sources)
    crashed = _fill_cache(folder, hashes, cache, settings, run)
    if corpus_state(folder) != state:  # DVC hashes the corpus after the stage, so it would not read the change again
        raise changed(folder)
    known_texts: set[str] = set()
    for source in sources:
        sha256 = hashes[source]
        if isinstance(sha256, Reason):
            yield Document(source.id, sha256="", reason=sha256)
            continue
        extraction = crashed.get(sha256) or Extraction(**json.loads((cache / f"{sha256}.json").read_bytes()))
        reason, text = extraction.reason, extraction.text
        if reason is None:
            key = text_sha256(text)
            if key in known_texts:
                reason, text = Reason.DUPLICATE, ""
            known_texts.add(key)
        fields = asdict(extraction) | {"reason": reason, "text": text}
        if reason is not None:
            fields["language"] = None
        yield Document(id=source.id, sha256=sha256, characters=len(text), **fields)


def _hash_all(folder: Path, sources: Sequence[Source]) -> dict[Source, str | Reason]:
    """Returns the SHA-256 of each PDF, or the reason why it cannot be read."""
    try:
        with ThreadPoolExecutor(num_cores()) as threads:
            return dict(zip(sources, threads.map(partial(hash_source, folder), sources), strict=True))
    except FileNotFoundError as error:
        raise changed(error.filename) from error


def _fill_cache(
    folder: Path, hashes: Mapping[Source, str | Reason], cache: Path, settings: Extract, run: ExtractAll
) -> dict[str, Extraction]:
    """Extracts the PDFs that are not in the cache. Writes each result at once, so an interrupted stage keeps it.

    Returns SHA-256 -> extraction of the PDFs that crashed an engine. They are not cached, because the cause can be the
    machine.
    """
    missing: dict[str, Source] = {}  # the first source of each content
    for source, sha256 in hashes.items():
        if not isinstance(sha256, Reason) and sha256 not in missing and not (cache / f"{sha256}.json").exists():
            missing[sha256] = source
    tasks = {source: sha256 for sha256, source in missing.items()}
    crashed = {}
    progress = tqdm(run(folder, tasks, settings), total=len(tasks), desc="extract", unit="pdf", disable=None)
    for source, extraction in progress:
        if Reason.CRASHED in extraction.attempts.values():
            crashed[tasks[source]] = extraction
            continue
        with atomic_write(cache / f"{tasks[source]}.json") as partial_file:
            partial_file.write_text(json.dumps(asdict(extraction), ensure_ascii=False), encoding="utf-8")
    return crashed


def summarize(documents: Iterable[Document]) -> dict[str, Any]:
    """Returns the content of metrics/extract.json."""
    num_documents = 0
    left_out, engines, languages, removed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    sums = Counter[str](dict.fromkeys(("partial", "pages_read", "pages_unread", *SUMMED), 0))
    for document in documents:
        num_documents += 1
        if document.reason is not None:
            left_out[str(document.reason)] += 1
            continue
        engines[str(document.engine)] += 1
        languages[str(document.language)] += 1
        removed.update(document.removed)
        sums["partial"] += document.attempts[str(document.engine)] != COMPLETE
        sums["pages_read"] += document.pages_read
        sums["pages_unread"] += (document.num_pages or document.pages_read) - document.pages_read
        for name in SUMMED:
            sums[name] += getattr(document, name)
    return {
        "documents": num_documents,
        "kept": engines.total(),
        "left_out": dict(sorted(left_out.items())),
        "engine": dict(sorted(engines.items())),
        "language": dict(sorted(languages.items())),
        **sums,
        "removed": dict(sorted(removed.items())),
    }
