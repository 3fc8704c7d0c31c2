"""PDF -> pages of text. Engines run in processes that can be killed, since PDFs make them hang, swell and die.

Documents are read in parallel, one thread of this process and one worker process for each core. A worker sends every
page as soon as it is read, so what came before a fault is kept. The limits are processor seconds and address space,
not wall-clock time and free memory: a busy machine leaves out no other documents than an idle one.
"""

import logging
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from pdf2lora import cleaning

PageReader = Callable[[int], str]


class Reason(StrEnum):
    """Why a document is left out."""

    ENCRYPTED = "encrypted"
    DAMAGED = "damaged"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"  # the engine's process died: a fault in the engine, or memory that it could not get
    NO_TEXT_LAYER = "no_text_layer"
    UNREADABLE_FONT = "unreadable_font"
    TOO_SHORT = "too_short"
    DUPLICATE = "duplicate"


COMPLETE = "complete"
MAX_CHARACTERS = 10_000_000  # of one document: five thousand pages; what has more is a bomb


@dataclass
class Attempt:
    """What one engine made of one document."""

    engine: str
    outcome: str = COMPLETE  # or the Reason that stopped it
    num_pages: int | None = None
    pages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Extraction:
    """The text of one PDF, or the reason why there is none."""

    num_pages: int | None
    pages_read: int
    engine: str | None
    attempts: dict[str, str]
    characters_raw: int
    text: str
    reason: str | None


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
            if attempts[-1].outcome == COMPLETE and cleaning.is_readable("\n".join(attempts[-1].pages)):
                break
        return file, judge(attempts, clean=clean, min_characters=min_characters)

    with ThreadPoolExecutor(num_workers or num_cores()) as threads:
        yield from threads.map(extract_one, files)


def num_cores() -> int:
    """Those that this process may use: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def judge(attempts: list[Attempt], *, clean: bool, min_characters: int) -> Extraction:
    """Takes the attempt that was complete and readable, else the readable one with most text, else says why not."""
    readable = [attempt for attempt in attempts if cleaning.is_readable("\n".join(attempt.pages))]
    best = max(readable, key=lambda a: (a.outcome == COMPLETE, sum(map(len, a.pages))), default=None)
    raw = "\n".join(best.pages) if best else ""
    text = cleaning.clean(best.pages) if best and clean else raw
    kept = len(text) >= min_characters
    return Extraction(
        num_pages=next((a.num_pages for a in attempts if a.num_pages is not None), None),
        pages_read=len(best.pages) if best else 0,
        engine=best.engine if best else None,
        attempts={attempt.engine: attempt.outcome for attempt in attempts},
        characters_raw=len(raw),
        text=text if kept else "",
        reason=None if kept else _why_not(attempts, best),
    )


def _why_not(attempts: list[Attempt], best: Attempt | None) -> Reason:
    """What stopped the engines counts before what little they read; the last engine's word before a crash's silence."""
    complete = [attempt for attempt in attempts if attempt.outcome == COMPLETE]
    if best and best.outcome == COMPLETE:
        return Reason.TOO_SHORT
    if complete:
        has_text = any(page.strip() for attempt in complete for page in attempt.pages)
        return Reason.UNREADABLE_FONT if has_text else Reason.NO_TEXT_LAYER
    stopped = [Reason(attempt.outcome) for attempt in attempts]
    return next((reason for reason in reversed(stopped) if reason != Reason.CRASHED), Reason.CRASHED)


class Worker:
    """A child process that reads PDFs, started again after it was killed or died."""

    def __init__(self, *, timeout_s: float, memory_gib: float):
        self.timeout_s, self.memory_gib = timeout_s, memory_gib
        self.process: Any = None
        self.pipe: Connection

    def read(self, file: Path, engine: str, max_pages: int) -> Attempt:
        """Never raises for a bad PDF and never takes longer than timeout_s of processor time."""
        if self.process is None or not self.process.is_alive():
            self._start()
        attempt = Attempt(engine)
        try:
            started = self._processor_seconds()
            self.pipe.send((str(file), engine, max_pages))
            while self._processor_seconds() - started <= self.timeout_s:
                if not self.pipe.poll(0.1):
                    continue
                kind, value = self.pipe.recv()
                if kind == "page":
                    attempt.pages.append(value)
                elif kind == "num_pages":
                    attempt.num_pages = value
                else:
                    attempt.outcome = value
                    return attempt
            attempt.outcome = Reason.TIMED_OUT
        except (EOFError, OSError, psutil.Error):  # the worker died, perhaps in the middle of a message
            attempt.outcome = Reason.CRASHED
        self._stop()
        return attempt

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.memory_gib, self.timeout_s), daemon=True)
        self.process.start()
        theirs.close()

    def _stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None

    def _processor_seconds(self) -> float:
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)


def _work(pipe: Connection, memory_gib: float, timeout_s: float) -> None:
    """The child's side: for each (file, engine, max_pages) it sends num_pages, the pages, and how it ended."""
    silence = os.open(os.devnull, os.O_WRONLY)  # engines print what they think of a file
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    logging.disable()
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, int(memory_gib * 2**30))
    _limit(resource.RLIMIT_CORE, 0)
    while True:
        try:
            file, engine, max_pages = pipe.recv()
        except EOFError:
            return
        # A parent that was killed cannot kill: past twice its time an orphan is ended by the kernel.
        _limit(resource.RLIMIT_CPU, int(time.process_time() + 2 * timeout_s) + 1)
        pipe.send(("ended", _read_pages(pipe, Path(file), engine, max_pages)))


def _limit(kind: int, value: int) -> None:
    """Sets a soft limit; the hard one may be set for the whole job (`ulimit`, a cluster) and cannot be raised."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _read_pages(pipe: Connection, file: Path, engine: str, max_pages: int) -> str:
    """Sends num_pages and pages; returns COMPLETE or the Reason that stopped the engine."""
    outcome = COMPLETE
    try:
        num_pages, read_page = OPEN[engine](file)
        pipe.send(("num_pages", num_pages))
        characters = 0
        for number in range(min(num_pages, max_pages)):
            try:
                text = read_page(number)
            except (MemoryError, Encrypted):
                raise
            except Exception:  # a page that cannot be read: the others may be
                outcome, text = Reason.DAMAGED, ""
            characters += len(text)
            if characters > MAX_CHARACTERS:
                raise MemoryError
            pipe.send(("page", text.encode("utf-8", "replace").decode()))  # lone surrogates cannot be written to a file
    except MemoryError:
        return Reason.OUT_OF_MEMORY
    except Encrypted:
        return Reason.ENCRYPTED
    except Exception:  # PyPDF2 raises more than a dozen kinds, RecursionError among them
        return Reason.DAMAGED
    return outcome


class Encrypted(Exception):
    """The document asks for a password, or for a cipher that the engine does not have."""


def _open_pypdf2(file: Path) -> tuple[int, PageReader]:
    import PyPDF2

    reader = PyPDF2.PdfReader(file)
    if reader.is_encrypted:
        try:
            opened = reader.decrypt("")  # many documents restrict printing and open without a password
        except Exception as error:
            raise Encrypted from error
        if not opened:
            raise Encrypted
    return len(reader.pages), lambda number: reader.pages[number].extract_text()


def _open_pdfium(file: Path) -> tuple[int, PageReader]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower() or "security" in str(error).lower():
            raise Encrypted from error
        raise

    def read_page(number: int) -> str:
        page = document[number]
        text: str = page.get_textpage().get_text_bounded()
        page.close()
        return text

    return len(document), read_page


OPEN: dict[str, Callable[[Path], tuple[int, PageReader]]] = {"pypdf2": _open_pypdf2, "pdfium": _open_pdfium}
