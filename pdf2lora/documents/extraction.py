"""PDFs -> text, in parallel."""

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdf2lora.documents.quality import is_readable, judge
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
    """Extracts each file, in parallel; yields in the order of `files`. The results do not depend on num_workers."""
    idle = threading.local()

    def extract_one(file: Path) -> tuple[Path, Extraction]:
        if not hasattr(idle, "worker"):
            idle.worker = Worker(timeout_s=timeout_s, memory_gib=memory_gib)
        attempts = []
        for engine in engines:
            attempt = idle.worker.read(file, engine, max_pages)
            if attempt.outcome == Reason.CRASHED:  # by the machine (its memory, kill -9)? the file's fault comes again
                attempt = idle.worker.read(file, engine, max_pages)
            attempts.append(attempt)
            if attempts[-1].outcome == COMPLETE and is_readable("\n".join(attempts[-1].pages)):
                break
        return file, judge(attempts, clean=clean, min_characters=min_characters)

    with ThreadPoolExecutor(num_workers or num_cores()) as threads:
        yield from threads.map(extract_one, files)


def num_cores() -> int:
    """Those that this process may use: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
