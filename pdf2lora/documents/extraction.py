"""Text of many PDFs, in parallel worker processes."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pdf2lora.documents import ocr as ocr_package
from pdf2lora.documents.records import Attempt, Extraction, Reason
from pdf2lora.documents.selection import add_ocr, best_attempt, judge, pages_for_ocr
from pdf2lora.documents.worker import Worker
from pdf2lora.runtime.parallel import num_cores


def extract(
    files: Iterable[Path],
    *,
    engines: list[str],
    max_pages: int,
    timeout_s: float,
    memory_gib: float,
    clean: bool,
    min_characters: int,
    ocr: Literal["auto", "rapidocr", "none"],
    ocr_timeout_s: float,
    ocr_memory_gib: float,
    num_workers: int | None = None,
) -> Iterator[tuple[Path, Extraction]]:
    """Yields (file, extraction) in the order of `files`. The results do not depend on num_workers.

    Each engine reads each file; the best text is kept. OCR then reads the pages without readable text. The settings
    are those of the section `extract` of params.yaml. num_workers: None starts one worker per core.
    """
    local = threading.local()
    has_ocr = ocr != "none" and ocr_package.installed_version() is not None

    def extract_one(file: Path) -> tuple[Path, Extraction]:
        if not hasattr(local, "worker"):
            local.worker = Worker(timeout_s=timeout_s, memory_gib=memory_gib)
            local.ocr_worker = Worker(timeout_s=ocr_timeout_s, memory_gib=ocr_memory_gib, timeout_per_page=True)
        pages = range(max_pages)
        attempts = [_read(local.worker, file, engine, pages) for engine in engines]
        best = best_attempt(attempts)
        num_ocr = 0
        if has_ocr and (numbers := pages_for_ocr(attempts, best, max_pages)):
            attempt = _read(local.ocr_worker, file, "ocr", numbers)
            num_ocr = sum(map(bool, map(str.strip, attempt.pages)))
            if num_ocr:
                attempts.append(attempt)
                best = add_ocr(best, attempt, numbers)
        return file, judge(attempts, best, pages_ocr=num_ocr, clean=clean, min_characters=min_characters)

    with ThreadPoolExecutor(num_workers or num_cores()) as threads:
        yield from threads.map(extract_one, files)


def _read(worker: Worker, file: Path, engine: str, pages: Sequence[int]) -> Attempt:
    """The machine can be the cause of a crash (memory, kill -9), so a crash is tried once more."""
    attempt = worker.read(file, engine, pages)
    return worker.read(file, engine, pages) if attempt.outcome == Reason.CRASHED else attempt
