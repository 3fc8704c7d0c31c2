"""Dask schedulers and workers that run as processes on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
from helpers import REPOSITORY, wait_until

ENVIRONMENT = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s",  # a worker that stops is given up after this time
    "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def dask(kind: str, scheduler_file: Path, *options: str, folder: Path = REPOSITORY, **changes: str) -> Iterator[Any]:
    """A scheduler or a worker, started as a user would start it. folder: of the project's code."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(scheduler_file)]
    environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(folder), **changes}
    process = subprocess.Popen([*command, *options], cwd=folder, env=environ, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


@contextmanager
def start_scheduler(folder: Path, **changes: str) -> Iterator[tuple[Path, Any]]:
    """The scheduler's file and its process."""
    file = folder / "scheduler.json"
    with dask("scheduler", file, "--port", "0", "--no-dashboard", "--host", "127.0.0.1", **changes) as process:
        wait_until(file.exists)
        yield file, process


def worker(scheduler: Path, *options: str, **changes: Any) -> AbstractContextManager[Any]:
    return dask("worker", scheduler, "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", *options, **changes)


def wait_for_workers(scheduler: Path, number: int) -> None:
    from distributed import Client

    with Client(scheduler_file=str(scheduler), set_as_default=False) as client:
        client.wait_for_workers(number, timeout=60)


def end_process(item: object) -> None:
    """A task that ends its worker."""
    os._exit(1)
