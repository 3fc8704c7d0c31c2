from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import hanging_pdf, prose, write_pdf

from pdf2lora.documents.extraction import extract
from pdf2lora.documents.quality import judge
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason
from pdf2lora.documents.worker import Worker

SETTINGS: dict[str, Any] = {
    "engines": ["pypdf2", "pdfium"],
    "max_pages": 30,
    "timeout_s": 20.0,
    "memory_gib": 0.5,
    "clean": True,
    "min_characters": 100,
    "num_workers": 1,
}
SHORT_TIME = 1.5  # seconds that an engine that hangs is given


def read(file: Path, **changes: Any) -> Extraction:
    [(_, extraction)] = extract([file], **SETTINGS | changes)
    return extraction


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def extractions(pdfs: dict[str, Path]) -> dict[str, Extraction]:
    """What both engines make of the PDFs that need no time."""
    names = [name for name in pdfs if name not in ("hanging", "bomb")]
    results = list(extract([pdfs[name] for name in names], **SETTINGS | {"num_workers": 2}))
    return dict(zip(names, [extraction for _, extraction in results], strict=True))


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(timeout_s=20, memory_gib=0.5)
    yield worker
    if worker.process is not None:
        worker.process.kill()


@pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])
def test_an_engine_reads_all_pages(pdfs: dict[str, Path], engine: str) -> None:
    extraction = read(pdfs["plain"], engines=[engine])
    assert (extraction.reason, extraction.engine, extraction.attempts) == (None, engine, {engine: "complete"})
    assert (extraction.num_pages, extraction.pages_read) == (3, 3)
    assert flat(extraction.text) == flat(" ".join(prose(seed) for seed in (1, 2, 3)))
    assert extraction.characters_raw >= len(extraction.text)


def test_the_second_engine_is_not_asked_when_the_first_has_read_all(extractions: dict[str, Extraction]) -> None:
    assert extractions["plain"].attempts == {"pypdf2": "complete"}


def test_no_more_than_max_pages_are_read(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["plain"], max_pages=2)
    assert (extraction.num_pages, extraction.pages_read) == (3, 2)
    assert flat(extraction.text) == flat(f"{prose(1)} {prose(2)}")


def test_text_is_left_as_it_stands_without_clean(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["plain"], clean=False, engines=["pypdf2"])
    assert len(extraction.text) == extraction.characters_raw
    assert [line.strip() for line in extraction.text.split("\n")][:2] == prose(1).split("\n")[:2]


@pytest.mark.parametrize(
    ("name", "reason", "outcome"),
    [
        ("password", "encrypted", "encrypted"),
        ("truncated", "damaged", "damaged"),
        ("no_pdf", "damaged", "damaged"),
        ("empty", "damaged", "damaged"),
        ("scan", "no_text_layer", "complete"),
    ],
)
def test_a_pdf_without_text_is_left_out_with_its_reason(
    extractions: dict[str, Extraction], name: str, reason: str, outcome: str
) -> None:
    extraction = extractions[name]
    assert (extraction.reason, extraction.text, extraction.engine) == (reason, "", None)
    assert extraction.attempts == {"pypdf2": outcome, "pdfium": outcome}


def test_a_short_text_is_left_out(extractions: dict[str, Extraction], pdfs: dict[str, Path]) -> None:
    extraction = extractions["short"]
    assert (extraction.reason, extraction.text) == ("too_short", "")
    assert extraction.characters_raw >= len("Sea level")
    assert read(pdfs["short"], min_characters=len("Sea level")).text == "Sea level"


def test_a_blank_password_opens_the_document(extractions: dict[str, Extraction]) -> None:
    extraction = extractions["blank_password"]
    assert (extraction.reason, extraction.engine) == (None, "pypdf2")
    assert flat(extraction.text) == flat(prose(9))


def test_a_page_that_cannot_be_read_costs_no_other_page(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["one_bad_page"], engines=["pypdf2"])
    assert (extraction.reason, extraction.attempts) == (None, {"pypdf2": "damaged"})
    assert (extraction.num_pages, extraction.pages_read) == (3, 3)
    assert flat(extraction.text) == flat(f"{prose(6)} {prose(7)}")


def test_the_next_engine_reads_what_the_first_could_not(extractions: dict[str, Extraction]) -> None:
    extraction = extractions["one_bad_page"]
    assert extraction.engine == "pdfium"
    assert extraction.attempts == {"pypdf2": "damaged", "pdfium": "complete"}


def test_an_engine_that_hangs_is_stopped_and_the_next_one_reads(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["hanging"], timeout_s=SHORT_TIME)
    assert extraction.attempts == {"pypdf2": "timed_out", "pdfium": "complete"}
    assert (extraction.engine, extraction.pages_read) == ("pdfium", 3)
    assert flat(extraction.text) == flat(f"{prose(4)} {prose(5)}")


def test_the_pages_before_a_fault_are_kept(pdfs: dict[str, Path]) -> None:
    extraction = read(pdfs["hanging"], engines=["pypdf2"], timeout_s=SHORT_TIME)
    assert (extraction.reason, extraction.attempts) == (None, {"pypdf2": "timed_out"})
    assert (extraction.num_pages, extraction.pages_read) == (3, 2)
    assert flat(extraction.text) == flat(f"{prose(4)} {prose(5)}")


def test_a_document_that_hangs_on_its_first_page_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "hanging.pdf"
    file.write_bytes(hanging_pdf())
    extraction = read(file, engines=["pypdf2"], timeout_s=SHORT_TIME)
    assert (extraction.reason, extraction.text, extraction.pages_read) == ("timed_out", "", 0)


@pytest.mark.parametrize("engine", ["pypdf2", "pdfium"])
def test_a_bomb_takes_no_more_than_its_memory_and_the_next_document_is_read(pdfs: dict[str, Path], engine: str) -> None:
    files = [pdfs["bomb"], pdfs["plain"]]
    (_, bomb), (_, plain) = extract(files, **SETTINGS | {"engines": [engine]})
    assert bomb.reason in ("out_of_memory", "crashed")
    assert bomb.attempts == {engine: bomb.reason}
    assert (plain.reason, plain.pages_read) == (None, 3)


def test_a_worker_that_is_killed_at_work_has_crashed_and_the_next_document_is_read(
    worker: Worker, pdfs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.read(pdfs["plain"], "pypdf2", 1).outcome == COMPLETE
    killed, receive, received = worker.process, worker.pipe.recv, []

    def kill_after_two_pages() -> tuple[str, Any]:
        received.append(receive())
        if [kind for kind, _ in received] == ["num_pages", "page", "page"]:
            killed.kill()
        return received[-1]

    monkeypatch.setattr(worker.pipe, "recv", kill_after_two_pages)
    attempt = worker.read(pdfs["hanging"], "pypdf2", 30)
    assert (attempt.outcome, attempt.num_pages, len(attempt.pages)) == ("crashed", 3, 2)
    assert not killed.is_alive()
    assert worker.read(pdfs["plain"], "pypdf2", 30).outcome == COMPLETE


def test_a_worker_that_was_killed_while_idle_is_started_again(worker: Worker, pdfs: dict[str, Path]) -> None:
    worker.read(pdfs["plain"], "pypdf2", 1)
    first = worker.process
    first.kill()
    first.join()
    assert worker.read(pdfs["plain"], "pypdf2", 30).outcome == COMPLETE
    assert worker.process.pid != first.pid


def test_a_worker_reads_one_document_after_the_other(worker: Worker, pdfs: dict[str, Path]) -> None:
    worker.read(pdfs["plain"], "pypdf2", 1)
    first = worker.process.pid
    outcomes = [
        worker.read(pdfs[name], engine, 1).outcome for name in ("no_pdf", "plain") for engine in ("pypdf2", "pdfium")
    ]
    assert outcomes == ["damaged", "damaged", "complete", "complete"]
    assert worker.process.pid == first


def test_results_and_their_order_do_not_depend_on_the_number_of_workers(pdfs: dict[str, Path], tmp_path: Path) -> None:
    large = write_pdf(tmp_path / "large.pdf", [prose(seed) for seed in range(40)])
    files = [large, *(pdfs[name] for name in ("no_pdf", "plain", "short", "password", "one_bad_page", "scan"))]
    one, three = (list(extract(files, **SETTINGS | {"max_pages": 40, "num_workers": number})) for number in (1, 3))
    assert [file for file, _ in three] == files
    assert one == three


def test_no_files_give_nothing() -> None:
    assert list(extract([], **SETTINGS)) == []


CODES = "\x1b\x1c\x13\x15 \x11\x14 \x1e\x12 " * 20
READABLE = [f"{prose(1)}\n", prose(2)]


def judged(*attempts: Attempt, clean: bool = True, min_characters: int = 50) -> Extraction:
    return judge(list(attempts), clean=clean, min_characters=min_characters)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_complete_attempt_is_better_than_a_longer_partial_one(order: slice) -> None:
    partial = Attempt("pypdf2", Reason.TIMED_OUT, 3, READABLE * 2)
    whole = Attempt("pdfium", COMPLETE, 3, READABLE)
    extraction = judged(*[partial, whole][order])
    assert (extraction.engine, extraction.pages_read, extraction.num_pages) == ("pdfium", 2, 3)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_readable_partial_attempt_is_better_than_an_unreadable_complete_one(order: slice) -> None:
    partial = Attempt("pypdf2", Reason.DAMAGED, 2, READABLE[:1])
    whole = Attempt("pdfium", COMPLETE, 2, [CODES, CODES])
    extraction = judged(*[partial, whole][order])
    assert (extraction.engine, extraction.reason) == ("pypdf2", None)
    assert flat(extraction.text) == flat(READABLE[0])


def test_of_two_partial_attempts_the_longer_one_is_taken() -> None:
    shorter = Attempt("pypdf2", Reason.TIMED_OUT, 5, READABLE[:1])
    longer = Attempt("pdfium", Reason.CRASHED, 5, READABLE)
    assert judged(shorter, longer).engine == "pdfium"
    assert judged(longer, shorter).engine == "pdfium"


def test_the_outcomes_of_all_engines_are_told() -> None:
    extraction = judged(Attempt("pypdf2", Reason.CRASHED), Attempt("pdfium", COMPLETE, 2, READABLE))
    assert extraction.attempts == {"pypdf2": "crashed", "pdfium": "complete"}
    assert extraction.num_pages == 2


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([Attempt("pypdf2", COMPLETE, 1, ["Sea level"])], "too_short"),
        ([Attempt("pypdf2", COMPLETE, 1, ["", " \n"])], "no_text_layer"),
        ([Attempt("pypdf2", COMPLETE, 1, [CODES])], "unreadable_font"),
        ([Attempt("pypdf2", COMPLETE, 1, [CODES]), Attempt("pdfium", COMPLETE, 1, [""])], "unreadable_font"),
        ([Attempt("pypdf2", Reason.DAMAGED), Attempt("pdfium", COMPLETE, 1, [""])], "no_text_layer"),
        (
            [Attempt("pypdf2", Reason.TIMED_OUT, 9, ["Sea level"]), Attempt("pdfium", COMPLETE, 9, [CODES])],
            "unreadable_font",
        ),
        ([Attempt("pypdf2", Reason.TIMED_OUT, 9, ["Sea level"])], "timed_out"),
        ([Attempt("pypdf2", Reason.DAMAGED), Attempt("pdfium", Reason.ENCRYPTED)], "encrypted"),
        ([Attempt("pypdf2", Reason.OUT_OF_MEMORY), Attempt("pdfium", Reason.CRASHED)], "out_of_memory"),
        ([Attempt("pypdf2", Reason.CRASHED), Attempt("pdfium", Reason.CRASHED)], "crashed"),
    ],
)
def test_the_reason_why_there_is_no_text(attempts: list[Attempt], reason: str) -> None:
    extraction = judged(*attempts)
    assert (extraction.reason, extraction.text) == (reason, "")


def test_the_shortest_text_that_is_kept_has_min_characters() -> None:
    whole = Attempt("pypdf2", COMPLETE, 1, ["The sea level"])
    assert judged(whole, min_characters=13).text == "The sea level"
    assert judged(whole, min_characters=14).reason == "too_short"


def test_min_characters_counts_what_is_left_after_cleaning() -> None:
    whole = Attempt("pypdf2", COMPLETE, 1, ["The sea level ..............................."])
    assert judged(whole, min_characters=20).reason == "too_short"
    assert judged(whole, min_characters=20, clean=False).reason is None


def many_lines(pages: int) -> bytes:
    """Pages that PyPDF2 reads slowly, each in a fraction of a second."""
    from io import BytesIO

    from reportlab.pdfgen.canvas import Canvas

    file = BytesIO()
    canvas = Canvas(file, invariant=1)
    for _ in range(pages):
        text = canvas.beginText(50, 800)
        for number in range(2500):
            text.textLine(f"words {number}")
        canvas.drawText(text)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def test_the_time_limit_holds_while_pages_keep_arriving(tmp_path):
    file = tmp_path / "slow.pdf"
    file.write_bytes(many_lines(60))

    attempt = Worker(timeout_s=0.5, memory_gib=1).read(file, "pypdf2", 60)

    assert attempt.outcome == Reason.TIMED_OUT
    assert 0 < len(attempt.pages) < 60


def test_a_worker_that_is_dead_before_the_first_word_is_a_crash(tmp_path):
    class Dead(Worker):
        def _start(self):
            super()._start()
            self.process.kill()
            self.process.join()

    assert Dead(timeout_s=1, memory_gib=1).read(tmp_path / "any.pdf", "pypdf2", 1).outcome == Reason.CRASHED


def test_limits_of_the_whole_job_are_kept(tmp_path, monkeypatch):
    import resource

    from pdf2lora.documents import worker

    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5, 10))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))

    worker._limit(resource.RLIMIT_CPU, 100)
    worker._limit(resource.RLIMIT_CPU, 7)

    assert limits == [(10, 10), (7, 10)]
