"""A child process that reads PDFs. A hostile PDF cannot hang, exhaust the memory of, or crash the parent.

The parent kills a worker that uses too much processor time. The kernel limits the worker's memory and, if the parent
dies, its time.
"""

import logging
import multiprocessing
import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from pdf2lora.documents.engines import ENGINES, Encrypted
from pdf2lora.documents.records import COMPLETE, Attempt, Reason

MAX_CHARACTERS = 10_000_000  # of one document, about 5,000 pages; a longer text is a decompression bomb


class Worker:
    """A child process that reads PDFs. It starts again after it was killed or died."""

    def __init__(self, *, timeout_s: float, memory_gib: float):
        self.timeout_s, self.memory_gib = timeout_s, memory_gib
        self.process: Any = None
        self.pipe: Connection

    def read(self, file: Path, engine: str, max_pages: int) -> Attempt:
        """Reads the first max_pages pages. Uses at most timeout_s of processor time; never raises for a bad PDF."""
        if self.process is None or not self.process.is_alive():
            self._start()
        attempt = Attempt(engine)
        try:
            start_s = self._processor_time_s()
            self.pipe.send((str(file), engine, max_pages))
            while self._processor_time_s() - start_s <= self.timeout_s:
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
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, self.memory_gib, self.timeout_s), daemon=True)
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


def _serve(pipe: Connection, memory_gib: float, timeout_s: float) -> None:
    """The main loop of the child. For each request it sends the number of pages, the pages and the outcome."""
    devnull = os.open(os.devnull, os.O_WRONLY)  # engines print warnings about a file
    os.dup2(devnull, sys.stdout.fileno())
    os.dup2(devnull, sys.stderr.fileno())
    logging.disable()
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, int(memory_gib * 2**30))
    _limit(resource.RLIMIT_CORE, 0)
    while True:
        try:
            file, engine, max_pages = pipe.recv()
        except EOFError:
            return
        # A parent that was killed cannot stop this process. The kernel then stops it after twice its time.
        _limit(resource.RLIMIT_CPU, int(time.process_time() + 2 * timeout_s) + 1)
        pipe.send(("outcome", _read_pages(pipe, Path(file), engine, max_pages)))


def _limit(kind: int, value: int) -> None:
    """Sets a soft limit. It stays below the hard limit, which belongs to the whole job (`ulimit`, a cluster)."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _read_pages(pipe: Connection, file: Path, engine: str, max_pages: int) -> str:
    """Sends the number of pages and the pages. Returns COMPLETE or the Reason that stopped the engine."""
    outcome = COMPLETE
    try:
        num_pages, read_page = ENGINES[engine](file)
        pipe.send(("num_pages", num_pages))
        num_characters = 0
        for number in range(min(num_pages, max_pages)):
            try:
                text = read_page(number)
            except (MemoryError, Encrypted):
                raise
            except Exception:  # other pages can still be readable
                outcome, text = Reason.DAMAGED, ""
            num_characters += len(text)
            if num_characters > MAX_CHARACTERS:
                raise MemoryError
            pipe.send(("page", text.encode("utf-8", "replace").decode()))  # UTF-8 files cannot hold lone surrogates
    except MemoryError:
        return Reason.OUT_OF_MEMORY
    except Encrypted:
        return Reason.ENCRYPTED
    except Exception:  # PyPDF2 raises more than a dozen types, also RecursionError
        return Reason.DAMAGED
    return outcome
