"""Reads the text of many PDFs in parallel. A task is one PDF.

One process per core selects and cleans the text. Each of them has a child process that runs the engines and can be
killed (worker.py). Threads instead of processes would clean the text on one core only.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue

from pdf2lora.documents import ocr
from pdf2lora.documents.archives import DamagedMember
from pdf2lora.documents.records import Attempt, Extraction, Reason
from pdf2lora.documents.selection import (
    add_ocr,
    as_sample,
    best_attempt,
    judge,
    may_be_better,
    pages_for_ocr,
    pages_to_compare,
)
from pdf2lora.documents.sources import Source, changed, local_file
from pdf2lora.documents.worker import Worker
from pdf2lora.params import Extract
from pdf2lora.runtime.files import file_sha256
from pdf2lora.runtime.parallel import killed_worker_reported, num_cores, process_pool

PACKAGES = ("PyPDF2", "pypdfium2", "py3langid")  # another version can give another text or language
WAITING_PER_CORE = 4  # tasks that are submitted before the first one has finished
POLL_S = 10


class Reader:
    """Reads PDFs, one at a time."""

    def __init__(self, settings: Extract):
        self.settings = settings
        self.has_ocr = settings.ocr != "none" and ocr.installed_version() is not None
        self.worker = Worker(timeout_s=settings.timeout_s, memory_gib=settings.memory_gib)
        self.ocr_worker = Worker(
            timeout_s=settings.ocr_timeout_s, memory_gib=settings.ocr_memory_gib, timeout_per_page=True
        )

    def read(self, file: Path) -> Extraction:
        """Keeps the best text of the engines. OCR then reads the pages without readable text."""
        settings = self.settings
        first, *others = settings.engines
        attempts = [_read(self.worker, file, first, range(settings.max_pages))]
        attempts += [self._read_after(attempts[0], file, engine) for engine in others]
        best = best_attempt(attempts)
        num_ocr = 0
        if self.has_ocr and (numbers := pages_for_ocr(attempts, best, settings.max_pages)):
            attempt = _read(self.ocr_worker, file, "ocr", numbers)
            num_ocr = sum(map(bool, map(str.strip, attempt.pages)))
            if num_ocr:
                attempts.append(attempt)
                best = add_ocr(best, attempt, numbers)
        return judge(attempts, best, pages_ocr=num_ocr, clean=settings.clean, min_characters=settings.min_characters)

    def _read_after(self, first: Attempt, file: Path, engine: str) -> Attempt:
        """Reads some pages, and then all if their text is better than that of the first engine."""
        numbers = pages_to_compare(first)
        if numbers is not None:
            sample = as_sample(_read(self.worker, file, engine, numbers), numbers, len(first.pages))
            if not may_be_better(sample, first):
                return sample
        return _read(self.worker, file, engine, range(self.settings.max_pages))


def _read(worker: Worker, file: Path, engine: str, pages: Sequence[int]) -> Attempt:
    """The machine can be the cause of a crash (memory, kill -9), so after a crash the file is read once more."""
    attempt = worker.read(file, engine, pages)
    return worker.read(file, engine, pages) if attempt.outcome == Reason.CRASHED else attempt


def extract(
    folder: Path, sources: Mapping[Source, str], settings: Extract, *, num_workers: int | None = None
) -> Iterator[tuple[Source, Extraction]]:
    """Yields (source, extraction) as they finish. The results do not depend on num_workers.

    sources: each PDF with the SHA-256 of its bytes.
    num_workers: None means one worker per core.

    Raises InputError if a PDF changed or a worker was killed.
    """
    num_workers = min(num_workers or num_cores(), len(sources))
    pool = process_pool(num_workers) if num_workers > 1 else ThreadPoolExecutor(1)
    with pool, killed_worker_reported():
        task = partial(extract_source, str(folder), settings)
        for source, future in run_all(partial(pool.submit, task), sources, WAITING_PER_CORE * num_workers):
            try:
                extraction = future.result()
            except FileNotFoundError as error:
                raise changed(folder / source.path) from error
            yield source, extraction


def run_all(
    submit: Callable[[Source, str], Future[Extraction]],
    sources: Mapping[Source, str],
    num_waiting: int,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Source, Future[Extraction]]]:
    """Submits all sources, at most num_waiting at a time. Yields the futures as they finish.

    num_waiting: 1 or more.
    poll: is called if no task finishes for POLL_S seconds.
    """
    waiting: dict[Future[Extraction], Source] = {}
    finished: SimpleQueue[Future[Extraction]] = SimpleQueue()
    remaining = iter(sources.items())
    try:
        while True:
            for source, sha256 in islice(remaining, num_waiting - len(waiting)):
                future = submit(source, sha256)
                waiting[future] = source
                future.add_done_callback(finished.put)
            if not waiting:
                return
            try:
                future = finished.get(timeout=POLL_S)
            except Empty:
                poll()
                continue
            yield waiting.pop(future), future
    finally:
        for future in waiting:
            future.cancel()


_thread = threading.local()


def extract_source(folder: str, settings: Extract, source: Source, sha256: str) -> Extraction:
    """Extracts one PDF with the Reader of this thread, which keeps its child process.

    Raises:
        FileNotFoundError: the PDF or its archive does not exist.
        InputError: the PDF does not have this SHA-256 any more.
    """
    if getattr(_thread, "settings", None) != settings:
        _thread.settings, _thread.reader = settings, Reader(settings)
    try:
        with local_file(folder, source) as file:
            extraction: Extraction = _thread.reader.read(file)
            if file_sha256(file) == sha256:
                return extraction
    except DamagedMember as error:
        raise changed(f"{folder}/{source.id}") from error
    raise changed(f"{folder}/{source.id}")
