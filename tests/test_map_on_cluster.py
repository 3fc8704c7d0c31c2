"""Sketches and tokens on a Dask scheduler and workers that run as processes on this machine."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dask_processes import end_process, start_scheduler, wait_for_workers, worker
from helpers import REPOSITORY, make_document, prose, wait_until, write_documents
from tiny_llama import BOS, EOS, byte_tokenizer, write_tiny_llama
from tiny_pdfs import EXTRACT_SETTINGS, write_pdf

from pdf2lora.cluster import tasks
from pdf2lora.cluster.extraction import extract_on_cluster
from pdf2lora.cluster.tasks import WorkersDied, map_on_cluster, open_cluster
from pdf2lora.documents.sources import Source
from pdf2lora.errors import InputError
from pdf2lora.runtime import parallel
from pdf2lora.runtime.files import file_sha256
from pdf2lora.split import sketches
from pdf2lora.split.sketches import sketch_texts
from pdf2lora.token_files import encode_texts
from pdf2lora.tokens import Encoder
from stages import split, tokenize

pytest.importorskip("distributed", reason="needs requirements-cluster.txt")
pytestmark = pytest.mark.timeout(300)
TEXTS = [prose(seed) for seed in range(60)]


def test_a_killed_worker_loses_nothing(scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text is a batch, and at most four are at the scheduler."""
    monkeypatch.setattr(sketches, "batches", lambda texts: parallel.batches(texts, 1))
    monkeypatch.setattr("pdf2lora.token_files.MAX_BATCH_CHARACTERS", 1)
    monkeypatch.setattr(tasks, "NUM_WAITING", 4)
    encoder = Encoder.from_json(byte_tokenizer().to_str(), BOS, EOS)
    expected = [tokens.tolist() for tokens in encode_texts(encoder, TEXTS)]
    sketch_texts(TEXTS, tmp_path / "local.npy", map)

    def texts_until_death(process: Any) -> Iterator[str]:
        for number, text in enumerate(TEXTS):
            if number == 20:
                process.kill()
            if number == 22:
                stack.enter_context(worker(scheduler))
            yield text

    with ExitStack() as stack:
        run: Any = partial(map_on_cluster, str(scheduler), "split", ("numpy",))
        first, second = (stack.enter_context(worker(scheduler, "--no-nanny")) for _ in range(2))
        wait_for_workers(scheduler, 2)
        sketch_texts(texts_until_death(first), tmp_path / "dask.npy", run)
        assert (tmp_path / "dask.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()

        monkeypatch.setattr(tasks, "MAX_INLINE_BYTES", 1000)  # the tokenizer is sent once to each worker
        run = partial(map_on_cluster, str(scheduler), "tokenize", ("tokenizers",))
        assert [tokens.tolist() for tokens in encode_texts(encoder, texts_until_death(second), run)] == expected


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project before the stage split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write_tiny_llama(tmp_path / "models/base")
    (tmp_path / "data").mkdir()
    documents = [make_document(f"{number}.pdf", text) for number, text in enumerate(TEXTS)]
    write_documents(tmp_path / "data/documents.jsonl", documents)


def results() -> dict[Path, bytes]:
    files = [*Path("data").rglob("*.*"), *Path("metrics").rglob("*")]
    return {file: file.read_bytes() for file in files}


@pytest.mark.usefixtures("project")
def test_the_stages_compute_on_the_cluster_of_params(
    scheduler: Path, write_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params()
    split.main()
    tokenize.main()
    expected = results()
    assert {"data/split/train.jsonl", "data/tokens/train.npy"} < set(map(str, expected))
    shutil.rmtree(".scratch")
    for folder in ("data/split", "data/tokens", "metrics"):
        shutil.rmtree(folder)

    def fail(*arguments: object) -> None:
        raise AssertionError("computed on this machine")

    write_params({"cluster.scheduler": str(scheduler)})
    monkeypatch.setattr(sketches, "sketch", fail)
    monkeypatch.setattr(Encoder, "encode", fail)
    with worker(scheduler):
        split.main()
        tokenize.main()
    assert results() == expected

    write_params({"cluster.scheduler": "tcp://127.0.0.1:9"})  # nothing is new, so no scheduler is needed
    split.main()
    tokenize.main()
    assert results() == expected
    shutil.rmtree(".scratch")
    monkeypatch.setattr(tasks, "SCHEDULER_TIMEOUT_S", 1)
    for stage in (split, tokenize):
        with pytest.raises(
            SystemExit, match=r"^error: cluster\.scheduler: tcp://127\.0\.0\.1:9 did not answer [^\n]+$"
        ):
            stage.main()
    assert results() == expected


def test_a_scheduler_that_ends_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it ended before a task is submitted, or after a task was submitted that nobody does."""
    monkeypatch.setattr(tasks, "SCHEDULER_TIMEOUT_S", 1)
    monkeypatch.setattr(tasks, "POLL_S", 0.1)
    with (
        start_scheduler(tmp_path) as (file, process),
        worker(file),
        open_cluster(str(file), "split", (), abs) as opened,
    ):
        assert opened.result(opened.submit(-1)) == 1
        process.kill()
        wait_until(lambda: opened.client.status != "running")
        futures = [opened.submit(-1)]  # while the client tries to connect again
        wait_until(lambda: opened.client.status == "closed")
        for call in (lambda: opened.submit(-1), opened.require_workers, lambda: opened.result(futures[0])):
            with pytest.raises(InputError, match=r"was lost\. Run again; [^\n]+$"):
                call()


def test_a_task_that_ends_its_workers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with (
        start_scheduler(tmp_path, **changes) as (scheduler, _),
        worker(scheduler, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY}/tests"),
    ):
        with pytest.raises(WorkersDied, match="died in the same task, probably because their memory ran out") as caught:
            list(map_on_cluster(str(scheduler), "split", (), end_process, [1]))
        assert "\n" not in str(caught.value)

        pdf = Source(write_pdf(tmp_path / "a.pdf", [prose(1)]))
        monkeypatch.setattr("pdf2lora.cluster.extraction.partial", lambda *arguments: end_process)
        sources = {pdf: file_sha256(pdf.path)}
        ((source, extraction),) = extract_on_cluster(str(scheduler), "none", tmp_path, sources, EXTRACT_SETTINGS)
        assert (source, extraction.reason) == (pdf, "crashed")
