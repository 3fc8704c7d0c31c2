"""Extraction on the workers of a Dask cluster (requirements-cluster.txt). The results are those of this machine alone.

One task is one PDF. A task runs in a thread of a Dask worker, which starts worker processes that can be killed, as on
one machine. Before it reads a PDF, a task compares the code and the packages of its machine with those of the client,
and after it the bytes of the PDF. A PDF whose Dask worker dies is read by another one.
"""

import json
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pdf2lora.documents import ocr
from pdf2lora.documents.extraction import PACKAGES, extract_source, run_all
from pdf2lora.documents.records import Extraction, Reason
from pdf2lora.documents.sources import Source
from pdf2lora.errors import InputError
from pdf2lora.runtime.scratch import fingerprint, stage_code

SCHEDULER_TIMEOUT_S = 30
WORKERS_TIMEOUT_S = 60
NUM_WAITING = 2000  # tasks at the scheduler at a time, enough for 500 cores


def extract_on_cluster(
    scheduler: str, shared_corpus: str, folder: Path, sources: Mapping[Source, str], settings: Mapping[str, Any]
) -> Iterator[tuple[Source, Extraction]]:
    """Like extraction.extract, on the workers of a scheduler.

    scheduler, shared_corpus: the settings `cluster.scheduler` and `cluster.corpus`.

    Raises:
        InputError: a PDF changed; the scheduler does not answer; a worker is missing or cannot read PDFs as this
            machine does.
    """
    if not sources:
        return

    def task(arguments: bytes) -> Any:
        """Dask sends this function by value, because a worker that cannot import the project would end at once."""
        from pdf2lora.documents.cluster import extract_on_worker

        return extract_on_worker(*pickle.loads(arguments))

    with _without_logs(), _connect(scheduler) as client:
        folder_on_workers = str(folder.resolve()) if shared_corpus == "none" else shared_corpus.rstrip("/")
        has_ocr = settings["ocr"] != "none" and ocr.installed_version() is not None
        settings = {**settings, "ocr": "rapidocr" if has_ocr else "none"}
        constants = (environment(has_ocr), folder_on_workers, settings)
        executor = client.get_executor(pure=False)

        def submit(source: Source, sha256: str) -> Future[Extraction]:
            future: Future[Extraction] = executor.submit(task, pickle.dumps((*constants, source, sha256)))
            return future

        poll = partial(_require_workers, client, scheduler)
        for source, future in run_all(submit, sources, NUM_WAITING, poll):
            yield source, _result(scheduler, future)


@contextmanager
def _without_logs() -> Iterator[None]:
    """distributed logs tracebacks of a lost connection; the error message is enough."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _connect(scheduler: str) -> Iterator[Any]:
    """Yields a client of a scheduler that has workers."""
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise InputError(
            f"cluster.scheduler is {scheduler}; {error.name} is not installed. "
            "Run pip install -r requirements-cluster.txt, or set it to local."
        ) from error
    address = scheduler if "://" in scheduler else _read_address(Path(scheduler))
    try:
        client = Client(address, timeout=SCHEDULER_TIMEOUT_S, set_as_default=False)
    except OSError as error:
        raise InputError(
            f"cluster.scheduler: {address} did not answer within {SCHEDULER_TIMEOUT_S} s. "
            "Start the scheduler, or set cluster.scheduler to local."
        ) from error
    with client:
        _require_workers(client, scheduler)
        yield client


def _read_address(scheduler_file: Path) -> str:
    try:
        return str(json.loads(scheduler_file.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cluster.scheduler: {scheduler_file} is not the file of a running scheduler ({error}). "
            "Start one with --scheduler-file, or set cluster.scheduler to local."
        ) from error


def _require_workers(client: Any, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
    except TimeoutError as error:
        raise InputError(
            f"cluster.scheduler: {scheduler} had no workers for {WORKERS_TIMEOUT_S} s. "
            "Start workers and run again; finished documents are kept."
        ) from error


def _result(scheduler: str, future: Future[Extraction]) -> Extraction:
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:  # several workers died while they read it
        return Extraction(None, 0, None, {"dask": Reason.CRASHED}, 0, "", Reason.CRASHED)
    except CancelledError as error:
        raise InputError(
            f"cluster.scheduler: the connection to {scheduler} was lost. Run again; finished documents are kept."
        ) from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"a Dask worker of {scheduler} cannot import {error.name}. "
            "Start it in a checkout of this project, with the packages of requirements.txt."
        ) from error


@cache
def environment(has_ocr: bool) -> dict[str, str]:
    """Everything on a machine that can change the text of a PDF."""
    result = {"the code": fingerprint(*stage_code("extract")), "Python": "{}.{}".format(*sys.version_info[:2])}
    result |= {package: version(package) for package in PACKAGES}
    return result | ({"OCR": ocr.installed_version() or "not installed"} if has_ocr else {})


def extract_on_worker(
    expected: Mapping[str, str], folder: str, settings: Mapping[str, Any], source: Source, sha256: str
) -> Extraction:
    """The task. The messages of its errors reach the user of the client."""
    from distributed import get_worker

    worker = get_worker().address
    if multiprocessing.current_process().daemon:
        raise InputError(
            f"the Dask worker {worker} must not start processes. Start it with DASK_DISTRIBUTED__WORKER__DAEMON=False."
        )
    for name, value in environment("OCR" in expected).items():
        if value != expected[name]:
            raise InputError(
                f"the Dask worker {worker}: {name} is {value}, but {expected[name]} on this machine. "
                "Use the same commit and the same packages on both."
            )
    try:
        return extract_source(folder, settings, source, sha256)
    except FileNotFoundError as error:
        raise InputError(
            f"the Dask worker {worker} has no file {folder}/{source.path}. "
            "Share the folder of the corpus with the workers, or set cluster.corpus to its address."
        ) from error
