"""Runs a function on the workers of a Dask cluster (requirements-cluster.txt). The results are the same as without it.

A task is the function and one item. It runs in a thread of a Dask worker. Before each task, the worker compares the
code and the packages of its machine with those of the client. If a Dask worker dies, its tasks run on another one.
"""

import json
import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from pdf2lora.errors import InputError
from pdf2lora.runtime.parallel import results_in_order
from pdf2lora.runtime.scratch import fingerprint, stage_code

SCHEDULER_TIMEOUT_S = 30
WORKERS_TIMEOUT_S = 60
POLL_S = 10
NUM_WAITING = 50  # items of map_on_cluster at the scheduler at a time; a batch of texts has 1 to 12 MB
MAX_INLINE_BYTES = 100_000  # a larger pickled function is not sent with each task, but once to each worker

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkersDied(InputError):
    """Several Dask workers died while they ran one task."""


@dataclass(frozen=True)
class Cluster:
    """The connection to a scheduler whose workers run one function."""

    scheduler: str
    client: Any
    send: Callable[[bytes], Future[Any]]

    def submit(self, item: object) -> Future[Any]:
        """Raises InputError if the connection was lost."""
        from distributed.client import ClosedClientError

        try:
            return self.send(pickle.dumps(item))
        except ClosedClientError as error:
            raise self._lost() from error

    def result(self, future: Future[Any]) -> Any:
        """Waits for a task.

        Raises:
            WorkersDied: several workers died in this task.
            InputError: the connection was lost; all workers ended; a worker has other code or packages.
        """
        from distributed import KilledWorker

        while not wait([future], POLL_S).done:
            self.require_workers()
        try:
            return future.result()
        except KilledWorker as error:
            raise WorkersDied(
                f"cluster.scheduler: several workers of {self.scheduler} died in the same task, probably because their "
                "memory ran out. Start workers with fewer threads or more memory, then run again."
            ) from error
        except CancelledError as error:
            raise self._lost() from error
        except ModuleNotFoundError as error:
            raise InputError(
                f"a Dask worker of {self.scheduler} cannot import {error.name}. "
                "Start it in a checkout of this project, with the packages of requirements.txt."
            ) from error

    def require_workers(self) -> None:
        """Raises InputError if there was no worker for WORKERS_TIMEOUT_S, or if the connection was lost."""
        if self.client.status == "closed":
            raise self._lost()
        try:
            self.client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
        except TimeoutError as error:
            raise InputError(
                f"cluster.scheduler: {self.scheduler} had no workers for {WORKERS_TIMEOUT_S} s. "
                "Start workers and run again; extract keeps finished documents."
            ) from error
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> InputError:
        return InputError(
            f"cluster.scheduler: the connection to {self.scheduler} was lost. "
            "Run again; extract keeps finished documents."
        )


def map_on_cluster(
    scheduler: str, stage: str, packages: tuple[str, ...], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yields function(item) for each item, in their order. Reads at most NUM_WAITING items ahead.

    See open_cluster for the other arguments and the errors. An empty `items` needs no scheduler.
    """
    items = iter(items)
    first = list(islice(items, 1))
    if not first:
        return
    with open_cluster(scheduler, stage, packages, function) as cluster:
        yield from results_in_order(cluster.submit, chain(first, items), NUM_WAITING, cluster.result)


@contextmanager
def open_cluster(
    scheduler: str, stage: str, packages: tuple[str, ...], function: Callable[[Any], Any]
) -> Iterator[Cluster]:
    """Connects to a scheduler that has workers.

    Args:
        scheduler: the setting `cluster.scheduler`.
        stage, packages: the workers must have the same code of this stage, and the same versions of these packages.
        function: a function that pickle can find by its name. It can have large constants (functools.partial).

    Raises:
        InputError: the scheduler does not answer; it has no worker.
    """

    def task(constants: bytes, function: bytes, item: bytes) -> Any:
        """Dask sends this function by value, because a worker that cannot import the project would end at once."""
        from pdf2lora.cluster.tasks import run_on_worker

        return run_on_worker(constants, function, item)

    constants = pickle.dumps((stage, packages, environment(stage, packages)))
    pickled: Any = pickle.dumps(function)
    with _connect(scheduler) as client:
        executor = client.get_executor(pure=False)
        if len(pickled) > MAX_INLINE_BYTES:
            pickled = client.submit(lambda value: value, pickled, pure=False)
        cluster = Cluster(scheduler, client, lambda item: executor.submit(task, constants, pickled, item))
        cluster.require_workers()
        yield cluster


@contextmanager
def _connect(scheduler: str) -> Iterator[Any]:
    try:
        import dask
        from distributed import Client
    except ModuleNotFoundError as error:
        raise InputError(
            f"cluster.scheduler is {scheduler}; {error.name} is not installed. "
            "Run pip install -r requirements-cluster.txt, or set it to local."
        ) from error
    address = scheduler if "://" in scheduler else _read_address(Path(scheduler))
    logging.disable()  # distributed logs a traceback when a connection is lost; the error message is enough
    try:
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GB"}):
            try:
                client = Client(address, timeout=SCHEDULER_TIMEOUT_S, set_as_default=False)
            except OSError as error:
                raise InputError(
                    f"cluster.scheduler: {address} did not answer within {SCHEDULER_TIMEOUT_S} s. "
                    "Start the scheduler, or set cluster.scheduler to local."
                ) from error
            with client:
                yield client
    finally:
        logging.disable(logging.NOTSET)


def _read_address(scheduler_file: Path) -> str:
    try:
        return str(json.loads(scheduler_file.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cluster.scheduler: {scheduler_file} is not the file of a running scheduler ({error}). "
            "Start one with --scheduler-file, or set cluster.scheduler to local."
        ) from error


@cache
def environment(stage: str, packages: tuple[str, ...]) -> Mapping[str, str]:
    """The versions of everything on this machine that can change a result of the stage."""
    result = {"the code": fingerprint(*stage_code(stage)), "Python": "{}.{}".format(*sys.version_info[:2])}
    return result | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run_on_worker(constants: bytes, function: bytes, item: bytes) -> Any:
    """Runs one task. The client reports the message of an InputError to its user."""
    from distributed import get_worker

    stage, packages, expected = pickle.loads(constants)
    for name, value in environment(stage, packages).items():
        if value != expected[name]:
            raise InputError(
                f"the Dask worker {get_worker().address}: {name} is {value}, but {expected[name]} on this machine. "
                "Use the same commit and the same packages on both."
            )
    return _load(function)(pickle.loads(item))


_load: Callable[[bytes], Callable[[Any], Any]] = lru_cache(maxsize=4)(pickle.loads)
