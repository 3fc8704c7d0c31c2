"""Extraction on a Dask scheduler and workers that run as processes on this machine."""

import json
import logging
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dask_processes import start_scheduler, worker
from helpers import REPOSITORY, prose, wait_until, write_documents
from test_worker import slow_pdf
from tiny_pdfs import EXTRACT_SETTINGS, write_pdf

from pdf2lora.cluster import tasks
from pdf2lora.cluster.extraction import extract_on_cluster
from pdf2lora.cluster.tasks import environment, map_on_cluster
from pdf2lora.documents import ocr
from pdf2lora.documents.corpus import extract_corpus
from pdf2lora.documents.extraction import extract
from pdf2lora.documents.sources import list_corpus
from pdf2lora.errors import InputError
from pdf2lora.split import sketches

pytest.importorskip("distributed", reason="needs requirements-cluster.txt")
pytestmark = pytest.mark.timeout(300)


def write_corpus(folder: Path, number: int) -> Path:
    for n in range(number):
        write_pdf(folder / f"{n}.pdf", [prose(n), prose(1000 + n)])
    (folder / "slow.pdf").write_bytes(slow_pdf(3))
    (folder / "no.pdf").write_text("no PDF")
    shutil.make_archive(str(folder / "archive"), "zip", folder)
    write_pdf(folder / "only here.pdf", [prose(5000)])
    return folder


def documents(folder: Path, file: Path, run: Any) -> bytes:
    """The bytes of data/documents.jsonl."""
    sources = list_corpus(folder).sources
    write_documents(file, extract_corpus(folder, sources, file.with_suffix(".cache"), EXTRACT_SETTINGS, run))
    return file.read_bytes()


def test_a_killed_and_a_stopped_worker_lose_nothing(scheduler: Path, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", 30)
    expected = documents(folder, tmp_path / "local.jsonl", partial(extract, num_workers=1))
    assert expected.count(b"\n") == 2 * 32 + 1
    num_done_at_signals: list[int] = []

    def disturb() -> None:
        for process, number in ((killed, signal.SIGKILL), (stopped, signal.SIGSTOP)):
            wait_until(lambda: len(list((tmp_path / "dask.cache").glob("*"))) > 3 * (1 + len(num_done_at_signals)))
            process.send_signal(number)
            num_done_at_signals.append(len(list((tmp_path / "dask.cache").glob("*"))))

    with worker(scheduler, "--no-nanny") as killed, worker(scheduler, "--no-nanny") as stopped, worker(scheduler):
        thread = threading.Thread(target=disturb)
        thread.start()
        result = documents(folder, tmp_path / "dask.jsonl", partial(extract_on_cluster, str(scheduler), "none"))
        thread.join()

    assert num_done_at_signals[-1] < 32  # both signals came during the run
    assert result == expected


def test_workers_can_read_the_corpus_at_another_address(scheduler: Path, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", 2)
    expected = documents(folder, tmp_path / "local.jsonl", partial(extract, num_workers=1))
    shutil.copytree(folder, tmp_path / "shared")
    address = f"file://{tmp_path}/shared/"
    with worker(scheduler):
        result = documents(folder, tmp_path / "dask.jsonl", partial(extract_on_cluster, str(scheduler), address))
        assert result == expected
        (tmp_path / "shared/1.pdf").write_bytes(b"another file")
        with pytest.raises(InputError, match=r"shared/1\.pdf changed during the extraction"):
            documents(folder, tmp_path / "a.jsonl", partial(extract_on_cluster, str(scheduler), address))
        (tmp_path / "shared/1.pdf").unlink()
        for other in (address, f"{tmp_path}/shared"):
            with pytest.raises(InputError, match=r"has no file .*shared/1\.pdf\. Share the folder"):
                documents(folder, tmp_path / "b.jsonl", partial(extract_on_cluster, str(scheduler), other))


def error_of_run(scheduler: Path | str, tmp_path: Path) -> str:
    write_pdf(tmp_path / "corpus/a.pdf", [prose(1)])
    with pytest.raises(InputError) as caught:
        documents(tmp_path / "corpus", tmp_path / "a.jsonl", partial(extract_on_cluster, str(scheduler), "none"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_version_of_the_code_or_of_a_package_is_refused(
    scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("pdf2lora", "stages"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", checkout)
    for name in ("documents/cleaning", "split/sketches"):
        (checkout / f"pdf2lora/{name}.py").write_text("raise RuntimeError('another version')")
    with worker(scheduler, folder=checkout):
        message = error_of_run(scheduler, tmp_path)
        with pytest.raises(InputError, match=r"the code is \w+, but \w+ on this machine"):
            list(map_on_cluster(str(scheduler), "split", (), sketches._sketch_batch, [["a text"]]))
    assert message.startswith("the Dask worker tcp://127.0.0.1:")
    assert ": the code is " in message
    monkeypatch.setattr(ocr, "installed_version", lambda: "rapidocr 99")
    monkeypatch.setitem(globals(), "EXTRACT_SETTINGS", EXTRACT_SETTINGS.model_copy(update={"ocr": "rapidocr"}))
    with worker(scheduler):
        for name, value in (("pypdfium2", "0.1"), ("rapidocr", "99")):

            def changed(stage: str, packages: Any, name: str = name, value: str = value) -> dict[str, str]:
                return {**environment(stage, packages), name: value}

            same = environment("extract", (name,))[name]
            monkeypatch.setattr(tasks, "environment", changed)
            assert f": {name} is {same}, but {value} on this machine" in error_of_run(scheduler, tmp_path)


def test_a_worker_that_must_not_start_processes_is_refused(scheduler: Path, tmp_path: Path) -> None:
    with worker(scheduler, DASK_DISTRIBUTED__WORKER__DAEMON="True"):
        assert "DASK_DISTRIBUTED__WORKER__DAEMON=False" in error_of_run(scheduler, tmp_path)


def test_a_worker_without_the_project_is_refused(scheduler: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with worker(scheduler, folder=tmp_path / "elsewhere"):
        assert "cannot import pdf2lora" in error_of_run(scheduler, tmp_path)


def test_a_scheduler_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SCHEDULER_TIMEOUT_S", 1)
    assert "did not answer within 1 s" in error_of_run("tcp://127.0.0.1:9", tmp_path)
    assert "is not the file of a running scheduler" in error_of_run(tmp_path / "missing.json", tmp_path)
    (tmp_path / "stale.json").write_text(json.dumps({"address": "tcp://127.0.0.1:9"}))
    assert "did not answer" in error_of_run(tmp_path / "stale.json", tmp_path)


def test_a_scheduler_without_workers_is_refused(
    scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "WORKERS_TIMEOUT_S", 1)
    assert "had no workers for 1 s" in error_of_run(scheduler, tmp_path)


def test_a_scheduler_that_ends_is_reported_in_one_line(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", 10)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("distributed.client").addHandler(handler)

    def end() -> None:
        wait_until(lambda: list((tmp_path / "a.cache").glob("*")))
        scheduler.kill()

    with start_scheduler(tmp_path) as (file, scheduler), worker(file):
        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(InputError, match=r"was lost\. Run again"):
            documents(folder, tmp_path / "a.jsonl", partial(extract_on_cluster, str(file), "none"))
        thread.join()
    assert not records


def test_without_the_package_a_scheduler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install -r requirements-cluster.txt" in error_of_run("tcp://127.0.0.1:9", tmp_path)
