"""A child process that reads PDFs and can be killed."""

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

from pdf2lora.documents.engines import OPEN, Encrypted
from pdf2lora.documents.records import COMPLETE, Attempt, Reason

MAX_CHARACTERS = 10_000_000  # of one document: five thousand pages; what has more is a bomb


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
