"""Locks between processes."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pdf2lora.errors import InputError

POLL_S = 0.1


@contextmanager
def exclusive_lock(folder: Path, *, timeout_s: float = 0) -> Iterator[None]:
    """Holds the lock of a folder. The kernel releases it when the process ends, also after kill -9.

    Args:
        folder: an existing folder; the lock is its file `lock`, which contains the owner's process id.
        timeout_s: how long to wait for another owner to end.

    Raises InputError if another process still holds the lock after timeout_s.
    """
    deadline = time.monotonic() + timeout_s
    is_first_try = True
    with (folder / "lock").open("a+") as lock:
        while not try_lock(lock):
            lock.seek(0)
            owner = lock.read().strip() or "?"
            if time.monotonic() >= deadline:
                raise InputError(f"{folder} is locked by process {owner}. Wait until it ends, or end it.")
            if is_first_try:
                print(f"{folder.name}: waiting for process {owner}, which does the same work", flush=True)
                is_first_try = False
            time.sleep(POLL_S)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def try_lock(file: IO[str]) -> bool:
    """Locks an open file without waiting. False if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
