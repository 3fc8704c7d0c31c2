"""Extraction on the workers of a Dask cluster (see cluster/tasks.py).

One task is one PDF. The Dask worker starts worker processes that can be killed, as on one machine. After a task it
compares the bytes of the PDF with those that the client saw.
"""

import multiprocessing
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from pdf2lora.cluster.tasks import WorkersDied, open_cluster
from pdf2lora.documents import ocr
from pdf2lora.documents.extraction import PACKAGES, extract_source, run_all
from pdf2lora.documents.records import Extraction, Reason
from pdf2lora.documents.sources import Source
from pdf2lora.errors import InputError
from pdf2lora.params import Extract

NUM_WAITING = 2000  # names of PDFs at the scheduler at a time, enough for 500 cores


def extract_on_cluster(
    scheduler: str, shared_corpus: str, folder: Path, sources: Mapping[Source, str], settings: Extract
) -> Iterator[tuple[Source, Extraction]]:
    """Like extraction.extract, on the workers of a scheduler.

    scheduler, shared_corpus: the settings `cluster.scheduler` and `cluster.corpus`.

    Raises:
        InputError: a PDF changed; the scheduler does not answer or has no worker; a worker cannot read the PDFs, or
            has other code or packages.
    """
    if not sources:
        return
    folder_on_workers = str(folder.resolve()) if shared_corpus == "none" else shared_corpus.rstrip("/")
    has_ocr = settings.ocr != "none" and ocr.installed_version() is not None
    settings = settings.model_copy(update={"ocr": "rapidocr" if has_ocr else "none"})
    packages = PACKAGES + (ocr.PACKAGES if has_ocr else ())
    task = partial(extract_on_worker, folder_on_workers, settings)
    with open_cluster(scheduler, "extract", packages, task) as cluster:
        results = run_all(lambda *task: cluster.submit(task), sources, NUM_WAITING, cluster.require_workers)
        for source, future in results:
            try:
                extraction = cluster.result(future)
            except WorkersDied:
                extraction = Extraction(attempts={"dask": Reason.CRASHED}, reason=Reason.CRASHED)
            yield source, extraction


def extract_on_worker(folder: str, settings: Extract, source_and_sha256: tuple[Source, str]) -> Extraction:
    from distributed import get_worker

    worker = get_worker().address
    source, sha256 = source_and_sha256
    if multiprocessing.current_process().daemon:
        raise InputError(
            f"the Dask worker {worker} must not start processes. Start it with DASK_DISTRIBUTED__WORKER__DAEMON=False."
        )
    try:
        return extract_source(folder, settings, source, sha256)
    except FileNotFoundError as error:
        raise InputError(
            f"the Dask worker {worker} has no file {folder}/{source.path}. "
            "Share the folder of the corpus with the workers, or set cluster.corpus to its address."
        ) from error
