"""A stage ends with the dvc that started it, and starts once one that was left behind has ended.

kill -9 on dvc, or on a shell between it and the stage, ends that process alone. What it had started would go on, an
orphan, and write its outputs beside the stage that the next `dvc repro` starts. So every stage watches the processes
above it and ends by SIGTERM, on which train saves a checkpoint first; and no stage begins before its orphan is gone.
"""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from pdf2lora.runtime.launcher import PIPE
from pdf2lora.runtime.locks import exclusive_lock


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it has ended, and where an orphan's new parent is slow to ask, it exists for seconds more."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


WATCH_S = 0.2


LOCK_TIMEOUT_S = 60.0  # for an orphan to end its step and to save a checkpoint


def exit_with_parent() -> None:
    """Watches dvc and what stands between it and this process; nothing where dvc did not start it."""
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_watch, args=(ancestor_processes(),), daemon=True).start()


def ancestor_processes() -> list[psutil.Process]:
    """From the parent up to dvc: those that were started with DVC_STAGE in their environment, and the one above."""
    above = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            above.append(process)
            if "DVC_STAGE" not in process.environ():
                break
    return above


def _watch(above: list[psutil.Process]) -> None:
    while not _reparented(above[-1:]) and all(map(is_alive, above)):
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _reparented(top: list[psutil.Process]) -> bool:
    """dvc was gone before anyone could look: the process above is the one that adopts orphans."""
    with suppress(psutil.Error):
        return not top or (top[0].pid == 1 and not any("dvc" in word for word in top[0].cmdline()))
    return False


def single_instance(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a stage's `main`: it runs in one process at a time in a working copy.

    Raises:
        InputError: the other process did not end within LOCK_TIMEOUT_S.
    """
    stage = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def alone() -> None:
        if os.environ.get("RANK", "0") != "0" or PIPE in os.environ:  # the main process or the launcher holds the lock
            main()
            return
        folder = Path(".scratch/at_work") / stage
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, timeout_s=LOCK_TIMEOUT_S):
            main()

    return alone
