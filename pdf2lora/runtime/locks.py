"""Exclusive locks."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdf2lora.errors import InputError


@contextmanager
def exclusive_lock(folder: Path, *, timeout_s: float = 0) -> Iterator[None]:
    """Keeps a second process out of a scratch folder; the kernel frees it when the first ends, however it ends.

    timeout_s: how long to wait for the first to end.

    Raises:
        InputError: another process holds the folder.
    """
    import fcntl

    until = time.monotonic() + timeout_s
    told = False
    with (folder / "lock").open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "?"
            if time.monotonic() >= until:
                raise InputError(
                    f"{folder}: process {owner} is already at work on these very settings and data; "
                    "wait for it or end it"
                )
            if not told:
                print(f"{folder.name}: waits for process {owner}, which is at work on the same, to end", flush=True)
                told = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
