"""Start and end of a stage's process: it ends when its dvc ends, and no two runs of a stage overlap.

kill -9 on dvc, or on a shell between dvc and the stage, kills only that process. The stage would continue as an orphan
and write its outputs while the next `dvc repro` runs the same stage. Therefore every stage watches its ancestors and
ends by SIGTERM when one of them ends. train saves a checkpoint first. The next run waits for the orphan's lock.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from pdf2lora.errors import report_input_errors
from pdf2lora.runtime.arguments import require_no_arguments
from pdf2lora.runtime.launcher import PIPE, is_main_process
from pdf2lora.runtime.locks import exclusive_lock

POLL_S = 0.2
LOCK_TIMEOUT_S = 60.0  # enough for an orphan to finish its step and save a checkpoint
LOCKS = Path(".scratch/locks")


def exit_with_parent() -> None:
    """Starts a thread that ends this process when dvc, or a process between dvc and this one, ends.

    Does nothing if dvc did not start this process.
    """
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_watch_ancestors, args=(ancestor_processes(),), daemon=True).start()


def ancestor_processes() -> list[psutil.Process]:
    """The parent, its parent, and so on up to dvc: the first process without DVC_STAGE in its environment."""
    ancestors = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            ancestors.append(process)
            if "DVC_STAGE" not in process.environ():
                break
    return ancestors


def is_alive(process: psutil.Process) -> bool:
    """False for a zombie too: it has ended, but it exists until its parent reads its exit status."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def single_instance(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a stage's `main`: in one working copy, only one process at a time runs it.

    Raises InputError if another process did not end within LOCK_TIMEOUT_S.
    """
    stage = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def wrapper() -> None:
        if not is_main_process() or PIPE in os.environ:  # the main process or the launcher holds the lock
            main()
            return
        folder = LOCKS / stage
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, timeout_s=LOCK_TIMEOUT_S):
            main()

    return wrapper


def stage_main(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a stage's `main`: runs it as a single instance, and reports user errors in one line.

    `python -m stages.train --help` only prints the stage's docstring.
    """
    run = report_input_errors(single_instance(main))

    @functools.wraps(main)
    def wrapper() -> None:
        if main.__module__ == "__main__":
            require_no_arguments(sys.modules["__main__"].__doc__)
        run()

    return wrapper


def _watch_ancestors(ancestors: list[psutil.Process]) -> None:
    while not _is_orphan(ancestors) and all(map(is_alive, ancestors)):
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_orphan(ancestors: list[psutil.Process]) -> bool:
    """True if dvc ended before ancestor_processes ran: then the last ancestor is init, which adopts orphans."""
    if not ancestors:
        return True
    top = ancestors[-1]
    with suppress(psutil.Error):
        return top.pid == 1 and not any("dvc" in word for word in top.cmdline())
    return False
