import resource
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import prose
from reportlab.pdfgen.canvas import Canvas
from tiny_pdfs import raw_pdf, text_stream

from pdf2lora.documents import worker as worker_module
from pdf2lora.documents.records import COMPLETE, Reason
from pdf2lora.documents.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(timeout_s=20, memory_gib=0.5)
    yield worker
    if worker.process is not None:
        worker.process.kill()


def test_a_worker_killed_during_a_document_starts_again(
    worker: Worker, pdfs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.read(pdfs["plain"], "pypdf2", range(1)).outcome == COMPLETE
    process, receive = worker.process, worker.pipe.recv
    messages: list[tuple[str, Any]] = []

    def kill_after_two_pages() -> tuple[str, Any]:
        messages.append(receive())
        if [kind for kind, _ in messages] == ["file", "page", "page"]:
            process.kill()
        return messages[-1]

    monkeypatch.setattr(worker.pipe, "recv", kill_after_two_pages)
    attempt = worker.read(pdfs["hanging"], "pypdf2", range(30))
    assert (attempt.outcome, attempt.num_pages, len(attempt.pages)) == ("crashed", 3, 2)
    assert not process.is_alive()
    assert worker.read(pdfs["plain"], "pypdf2", range(30)).outcome == COMPLETE


def test_a_worker_killed_while_idle_starts_again(worker: Worker, pdfs: dict[str, Path]) -> None:
    worker.read(pdfs["plain"], "pypdf2", range(1))
    first = worker.process
    first.kill()
    first.join()
    assert worker.read(pdfs["plain"], "pypdf2", range(30)).outcome == COMPLETE
    assert worker.process.pid != first.pid


def test_a_worker_reads_several_documents(worker: Worker, pdfs: dict[str, Path]) -> None:
    worker.read(pdfs["plain"], "pypdf2", range(1))
    first = worker.process.pid
    outcomes = [
        worker.read(pdfs[name], engine, range(1)).outcome
        for name in ("no_pdf", "plain")
        for engine in ("pypdf2", "pdfium")
    ]
    assert outcomes == ["damaged", "damaged", "complete", "complete"]
    assert worker.process.pid == first


def slow_pdf(num_pages: int) -> bytes:
    """A PDF whose pages each take PyPDF2 a fraction of a second."""
    file = BytesIO()
    canvas = Canvas(file, invariant=1)
    for _ in range(num_pages):
        text = canvas.beginText(50, 800)
        for number in range(2500):
            text.textLine(f"words {number}")
        canvas.drawText(text)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def test_the_time_limit_holds_between_pages(tmp_path: Path) -> None:
    file = tmp_path / "slow.pdf"
    file.write_bytes(slow_pdf(60))

    attempt = Worker(timeout_s=0.5, memory_gib=1).read(file, "pypdf2", range(60))

    assert attempt.outcome == Reason.TIMED_OUT
    assert 0 < len(attempt.pages) < 60


def test_a_worker_that_dies_before_its_first_message_crashed(tmp_path: Path) -> None:
    class Dead(Worker):
        def _start(self) -> None:
            super()._start()
            self.process.kill()
            self.process.join()

    assert Dead(timeout_s=1, memory_gib=1).read(tmp_path / "any.pdf", "pypdf2", range(1)).outcome == Reason.CRASHED


def test_limits_stay_below_the_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5, 10))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))

    worker_module._limit(resource.RLIMIT_CPU, 100)
    worker_module._limit(resource.RLIMIT_CPU, 7)

    assert limits == [(10, 10), (7, 10)]


def test_a_text_larger_than_any_document_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has memory for more text than the parent can collect and clean."""
    line = "the sea rises and the ice melts " * 3000
    file = tmp_path / "large.pdf"
    file.write_bytes(raw_pdf(text_stream(prose(1)), *[text_stream(line)] * 4))
    messages: list[tuple[str, object]] = []
    monkeypatch.setattr(worker_module, "MAX_CHARACTERS", 150_000)

    pipe: Any = SimpleNamespace(send=messages.append)
    outcome = worker_module._read_pages(pipe, file, "pypdf2", range(30))

    assert outcome == "out_of_memory"
    assert [kind for kind, _ in messages] == ["file", "page", "page"]
