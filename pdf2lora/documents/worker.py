"""A child process that reads PDFs. A hostile PDF cannot hang or crash the parent, or exhaust its memory.

The parent kills a worker that uses too much processor time. The kernel limits the worker's memory and, if the parent
dies, its time.
"""

import logging
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from pdf2lora.documents.engines import ENGINES, Encrypted, Page
from pdf2lora.documents.ocr import open_ocr
from pdf2lora.documents.records import COMPLETE, Attempt, Reason

OPENERS = {**ENGINES, "ocr": open_ocr}
MAX_CHARACTERS = 10_000_000  # of one document, about 5,000 pages; a longer text is a decompression bomb


class Worker:
    """A child process that reads PDFs. A new one starts if it was killed or died."""

    def __init__(self, *, timeout_s: float, memory_gib: float, timeout_per_page: bool = False):
        """timeout_s: processor time for a document, or for each of its pages. memory_gib: address space."""
        self.timeout_s, self.memory_gib, self.timeout_per_page = timeout_s, memory_gib, timeout_per_page
        self.process: Any = None
        self.pipe: Connection

    def read(self, file: Path, engine: str, pages: Sequence[int]) -> Attempt:
        """Reads the pages with these numbers (from 0) that exist in the file. Never raises for a damaged PDF."""
        if self.process is None or not self.process.is_alive():
            self._start()
        attempt = Attempt(engine)
        try:
            start_s = self._processor_time_s()
            self.pipe.send((str(file), engine, pages, self.timeout_s, self.timeout_per_page))
            while self._processor_time_s() - start_s <= self.timeout_s:
                if not self.pipe.poll(0.1):
                    continue
                kind, value = self.pipe.recv()
                if kind == "page":
                    attempt.pages.append(value.text)
                    attempt.pages_reordered += value.is_reordered
                    if self.timeout_per_page:
                        start_s = self._processor_time_s()
                elif kind == "file":
                    attempt.num_pages, attempt.is_placeholder, attempt.num_attachments = value
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
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, self.memory_gib), daemon=True)
        self.process.start()
        child_pipe.close()

    def _stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None

    def _processor_time_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


def _serve(pipe: Connection, memory_gib: float) -> None:
    """The main loop of the child. For each request it sends properties of the file, the pages and the outcome."""
    devnull = os.open(os.devnull, os.O_WRONLY)  # engines print warnings about a file
    os.dup2(devnull, sys.stdout.fileno())
    os.dup2(devnull, sys.stderr.fileno())
    logging.disable()
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, int(memory_gib * 2**30))
    _limit(resource.RLIMIT_CORE, 0)
    while True:
        try:
            file, engine, pages, timeout_s, timeout_per_page = pipe.recv()
        except EOFError:
            return
        # If the parent was killed, it cannot stop this process. The kernel then stops it after twice its time.
        max_s = timeout_s * (len(pages) if timeout_per_page else 1)
        _limit(resource.RLIMIT_CPU, int(time.process_time() + 2 * max_s) + 1)
        pipe.send(("outcome", _read_pages(pipe, Path(file), engine, pages)))


def _limit(kind: int, value: int) -> None:
    """Sets a soft limit. It stays below the hard limit, which belongs to the whole job (`ulimit`, a cluster)."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _read_pages(pipe: Connection, file: Path, engine: str, pages: Sequence[int]) -> str:
    """Sends properties of the file, and the pages. Returns COMPLETE or the Reason that stopped the engine."""
    outcome = COMPLETE
    try:
        document = OPENERS[engine](file)
        pipe.send(("file", (document.num_pages, document.is_placeholder, document.num_attachments)))
        num_characters = 0
        for number in pages:
            if number >= document.num_pages:
                break
            try:
                page = document.read_page(number)
            except (MemoryError, Encrypted):
                raise
            except Exception:  # other pages can still be readable
                outcome, page = Reason.DAMAGED, Page("")
            num_characters += len(page.text)
            if num_characters > MAX_CHARACTERS:
                raise MemoryError
            text = page.text.encode("utf-8", "replace").decode()  # UTF-8 files cannot hold lone surrogates
            pipe.send(("page", Page(text, page.is_reordered)))
    except MemoryError:
        return Reason.OUT_OF_MEMORY
    except Encrypted:
        return Reason.ENCRYPTED
    except Exception:  # PyPDF2 raises more than a dozen types, also RecursionError
        return Reason.DAMAGED
    return outcome
