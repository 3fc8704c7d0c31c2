"""Text of many PDFs, in parallel worker processes."""

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdf2lora.documents.quality import is_readable, select
from pdf2lora.documents.records import COMPLETE, Extraction, Reason
from pdf2lora.documents.worker import Worker


def extract(
    files: Iterable[Path],
    *,
    engines: list[str],
    max_pages: int,
    timeout_s: float,
    memory_gib: float,
    clean: bool,
    min_characters: int,
    num_workers: int | None = None,
) -> Iterator[tuple[Path, Extraction]]:
    """Yields (file, extraction) in the order of `files`. The results do not depend on num_workers.

    The settings are those of the section `extract` of params.yaml. num_workers: None starts one worker per core.
    """
    local = threading.local()

    def extract_one(file: Path) -> tuple[Path, Extraction]:
        if not hasattr(local, "worker"):
            local.worker = Worker(timeout_s=timeout_s, memory_gib=memory_gib)
        attempts = []
        for engine in engines:
            attempt = local.worker.read(file, engine, max_pages)
            if attempt.outcome == Reason.CRASHED:  # the machine can be the cause (memory, kill -9): try once more
                attempt = local.worker.read(file, engine, max_pages)
            attempts.append(attempt)
            if attempt.outcome == COMPLETE and is_readable("\n".join(attempt.pages)):
                break
        return file, select(attempts, clean=clean, min_characters=min_characters)

    with ThreadPoolExecutor(num_workers or num_cores()) as threads:
        yield from threads.map(extract_one, files)


def num_cores() -> int:
    """Returns the number of cores that this process may use; the machine can have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
