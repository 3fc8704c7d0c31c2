"""Applies a function to many items on all cores, with bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

from pdf2lora.errors import InputError

ITEMS_PER_WORKER = 3  # items that wait or are in work
MAX_BATCH_CHARACTERS = 1_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


def process_pool(num_processes: int) -> ProcessPoolExecutor:
    """A pool whose processes end with this process, also if kill -9 ends it, and at once at Ctrl-C."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def end_with_parent() -> None:
    """Ends this process when its parent ends, also by kill -9, and at once at Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def killed_worker_reported() -> Iterator[None]:
    """Raises InputError instead of BrokenProcessPool."""
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed, probably because memory ran out (free -h shows it). Free some memory, "
            "then run again."
        ) from error


class Workers:
    """One process per core. They start when map() has at least two items, because the start takes half a second."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields function(item) for each item, in their order. Reads only a few items ahead, to keep the workers busy.

        function: a function of a module, because the workers import it.

        Raises InputError if a worker was killed.
        """
        items = iter(items)
        first = list(islice(items, 2))
        if len(first) < 2 and self.pool is None:
            yield from map(function, first)
            return
        self.pool = pool = self.pool or process_pool(num_cores())
        with killed_worker_reported():
            num_waiting = ITEMS_PER_WORKER * num_cores()
            yield from results_in_order(lambda item: pool.submit(function, item), chain(first, items), num_waiting)


def results_in_order(
    submit: Callable[[Item], Future[Result]],
    items: Iterable[Item],
    num_waiting: int,
    result: Callable[[Future[Result]], Result] = Future.result,
) -> Iterator[Result]:
    """Submits the items, at most num_waiting at a time. Yields result(future) of each one, in their order."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            if len(pending) >= num_waiting:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())
    finally:
        for future in pending:
            future.cancel()


def batches(texts: Iterable[str], max_characters: int = MAX_BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Groups texts into batches of at most max_characters. A longer text is the only one in its batch."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        if batch and num_characters + len(text) > max_characters:
            yield batch
            batch, num_characters = [], 0
        batch.append(text)
        num_characters += len(text)
    if batch:
        yield batch


def num_cores() -> int:
    """The number of cores that this process may use. The machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
