from typing import Any

import pytest
from helpers import prose

from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason
from pdf2lora.documents.selection import (
    add_ocr,
    as_sample,
    best_attempt,
    judge,
    may_be_better,
    pages_for_ocr,
    pages_to_compare,
)

CODES = "\x1b\x1c\x13\x15 \x11\x14 \x1e\x12 " * 20


READABLE = [f"{prose(1)}\n", prose(2)]


def select_from(*attempts: Attempt, clean: bool = True, min_characters: int = 50) -> Extraction:
    return judge(attempts, best_attempt(attempts), pages_ocr=0, clean=clean, min_characters=min_characters)


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_complete_attempt_is_preferred_to_a_longer_partial_one(order: slice) -> None:
    partial = Attempt("pypdf2", Reason.TIMED_OUT, 3, READABLE * 2)
    complete = Attempt("pdfium", COMPLETE, 3, READABLE)
    extraction = select_from(*[partial, complete][order])
    assert (extraction.engine, extraction.pages_read, extraction.num_pages) == ("pdfium", 2, 3)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_readable_partial_attempt_is_preferred_to_an_unreadable_complete_one(order: slice) -> None:
    partial = Attempt("pypdf2", Reason.DAMAGED, 2, READABLE[:1])
    complete = Attempt("pdfium", COMPLETE, 2, [CODES, CODES])
    extraction = select_from(*[partial, complete][order])
    assert (extraction.engine, extraction.reason) == ("pypdf2", None)
    assert flat(extraction.text) == flat(READABLE[0])


def test_the_longer_of_two_partial_attempts_is_selected() -> None:
    shorter = Attempt("pypdf2", Reason.TIMED_OUT, 5, READABLE[:1])
    longer = Attempt("pdfium", Reason.CRASHED, 5, READABLE)
    assert select_from(shorter, longer).engine == "pdfium"
    assert select_from(longer, shorter).engine == "pdfium"


def test_the_outcomes_of_all_engines_are_recorded() -> None:
    extraction = select_from(Attempt("pypdf2", Reason.CRASHED), Attempt("pdfium", COMPLETE, 2, READABLE))
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
        ([Attempt("pypdf2", Reason.ENCRYPTED), Attempt("pdfium", Reason.DAMAGED)], "encrypted"),
        ([Attempt("pypdf2", Reason.CRASHED), Attempt("pdfium", Reason.CRASHED)], "crashed"),
    ],
)
def test_the_reason_for_no_text(attempts: list[Attempt], reason: str) -> None:
    extraction = select_from(*attempts)
    assert (extraction.reason, extraction.text) == (reason, "")


def test_a_text_of_min_characters_is_kept() -> None:
    complete = Attempt("pypdf2", COMPLETE, 1, ["The sea level"])
    assert select_from(complete, min_characters=13).text == "The sea level"
    assert select_from(complete, min_characters=14).reason == "too_short"


def test_min_characters_counts_cleaned_text() -> None:
    complete = Attempt("pypdf2", COMPLETE, 1, ["The sea level ..............................."])
    assert select_from(complete, min_characters=20).reason == "too_short"
    assert select_from(complete, min_characters=20, clean=False).reason is None


def complete(engine: str, *pages: str, **fields: Any) -> Attempt:
    return Attempt(engine, COMPLETE, len(pages), list(pages), **fields)


SPLIT = prose(3).replace("carbon", "car bon").replace("energy", "ener gy").replace("glacier", "glac ier")


def selected_engine(*attempts: Attempt) -> str | None:
    best = best_attempt(attempts)
    return best.engine if best else None


@pytest.mark.parametrize("engines", [("pypdf2", "pdfium"), ("pdfium", "pypdf2")])
def test_the_text_without_split_words_is_selected(engines: tuple[str, str]) -> None:
    for wrong, right in (engines, engines[::-1]):
        attempts = {wrong: complete(wrong, SPLIT), right: complete(right, prose(3))}
        assert selected_engine(*[attempts[engine] for engine in engines]) == right


def test_the_text_without_glued_words_is_selected() -> None:
    glued = prose(3).replace("carbon ", "carbon").replace(" energy", "energy")
    assert selected_engine(complete("pdfium", glued), complete("pypdf2", prose(3))) == "pypdf2"


def test_the_first_of_two_equal_texts_is_selected() -> None:
    assert selected_engine(complete("pdfium", prose(3)), complete("pypdf2", prose(3))) == "pdfium"
    assert selected_engine(complete("pypdf2", prose(3)), complete("pdfium", prose(3))) == "pypdf2"


def test_a_text_with_less_than_half_of_the_characters_is_not_selected() -> None:
    assert selected_engine(complete("pdfium", SPLIT), complete("pypdf2", prose(3)[:100])) == "pdfium"
    assert selected_engine(complete("pdfium", prose(3)[:100]), complete("pypdf2", SPLIT)) == "pypdf2"


def test_pdfium_is_selected_for_right_to_left_text() -> None:
    line = "הזרימה בנהר בשנת 2019 הייתה 350 מטר לפי מודל HBV של האגן"
    wrong = " של האגןHBV  מטר לפי מודל350  הייתה2019 הזרימה בנהר בשנת"
    assert selected_engine(complete("pypdf2", wrong), complete("pdfium", line)) == "pdfium"
    assert selected_engine(complete("pdfium", line), complete("pypdf2", wrong)) == "pdfium"


def test_a_later_engine_first_reads_pages_far_from_each_other_and_the_empty_ones() -> None:
    pages = [prose(1)] * 16
    pages[3] = pages[9] = " \n"

    assert pages_to_compare(complete("pdfium", *pages)) == [1, 3, 6, 9, 10, 14]


@pytest.mark.parametrize(
    "first",
    [
        Attempt("pdfium", Reason.TIMED_OUT, 9, [prose(1)] * 8),
        complete("pdfium", *[prose(1)] * 4),  # so few pages
        complete("pdfium", *[" ".join(prose(1))] * 8),  # spaced-out letters
        complete("pdfium", *["הזרימה בנהר בשנת 2019 הייתה 350 מטר"] * 8),
        complete("pdfium", *[""] * 8),
    ],
)
def test_a_later_engine_reads_all_pages_if_a_sample_does_not_show_enough(first: Attempt) -> None:
    assert pages_to_compare(first) is None


def test_a_sample_shows_whether_the_engine_may_be_better() -> None:
    """The page that the first engine left empty does not count."""
    wrong, right = complete("pdfium", *[SPLIT] * 5, ""), complete("pdfium", *[prose(3)] * 5, "")
    numbers = [1, 3, 5]
    sample = as_sample(complete("pypdf2", prose(3), prose(3), prose(1)), numbers, 6)
    split = as_sample(complete("pypdf2", SPLIT, SPLIT, prose(1)), numbers, 6)

    assert (sample.is_sample, sample.pages) == (True, ["", prose(3), "", prose(3), "", prose(1)])
    assert (may_be_better(sample, wrong), may_be_better(sample, right)) == (True, False)
    assert (may_be_better(split, wrong), may_be_better(split, right)) == (False, False)
    assert not may_be_better(as_sample(Attempt("pypdf2", Reason.CRASHED), numbers, 6), wrong)


def test_a_sample_is_never_the_best_text_but_fills_empty_pages() -> None:
    """Its engine read five of six pages."""
    first = complete("pdfium", *[SPLIT] * 5, "")
    sample = as_sample(complete("pypdf2", *[prose(3)] * 5), [1, 2, 3, 4, 5], 6)

    best = best_attempt([first, sample])

    assert best is not None
    assert (best.engine, best.pages) == ("pdfium", [*[SPLIT] * 5, prose(3)])


def test_an_empty_page_is_taken_from_another_engine() -> None:
    best = best_attempt([complete("pdfium", prose(1), " \n"), complete("pypdf2", prose(1), prose(2))])
    assert best is not None
    assert (best.engine, best.pages) == ("pdfium", [prose(1), prose(2)])


def test_a_placeholder_page_is_left_out() -> None:
    extraction = select_from(complete("pdfium", prose(1), is_placeholder=True), complete("pypdf2", prose(1)))
    assert (extraction.reason, extraction.text) == ("placeholder", "")


@pytest.mark.parametrize(
    ("page", "reason"), [("Cover", "only_attachments"), ("", "only_attachments"), (prose(1), None)]
)
def test_a_short_document_with_attachments_has_its_own_reason(page: str, reason: str | None) -> None:
    assert select_from(complete("pdfium", page, num_attachments=2), complete("pypdf2", page)).reason == reason


def test_pages_without_readable_text_need_ocr() -> None:
    attempts = [complete("pdfium", prose(1), "", "12 13 14", CODES, " ")]
    assert pages_for_ocr(attempts, best_attempt(attempts), 30) == [1, 3, 4]
    assert pages_for_ocr(attempts, best_attempt(attempts), 2) == [1]


def test_a_stamp_on_each_page_of_a_scan_is_no_text() -> None:
    stamp = "This content downloaded from 192.0.2.7 on Mon, 1 Jan 2024"
    attempts = [complete(engine, *[stamp] * 3) for engine in ("pdfium", "pypdf2")]
    assert pages_for_ocr(attempts, best_attempt(attempts), 30) == [0, 1, 2]
    assert select_from(*attempts).reason == "no_text_layer"


def test_pages_of_codes_are_left_out_and_counted() -> None:
    extraction = select_from(
        complete("pdfium", prose(1), CODES, prose(2)), complete("pypdf2", prose(1), CODES, prose(2))
    )
    assert flat(extraction.text) == flat(f"{prose(1)} {prose(2)}")
    assert extraction.pages_unreadable == 1


@pytest.mark.parametrize("page", ["", CODES])
def test_all_pages_need_ocr_without_any_readable_text(page: str) -> None:
    attempts = [complete("pdfium", page, page), complete("pypdf2", page, page)]
    assert pages_for_ocr(attempts, best_attempt(attempts), 30) == [0, 1]


def test_a_file_that_no_engine_opens_gets_no_ocr() -> None:
    assert pages_for_ocr([Attempt("pdfium", Reason.ENCRYPTED)], None, 30) == []
    assert pages_for_ocr([complete("pdfium", "", is_placeholder=True)], None, 30) == []


def test_ocr_text_replaces_the_pages_without_text() -> None:
    best = complete("pdfium", prose(1), "", "")
    merged = add_ocr(best, Attempt("ocr", Reason.TIMED_OUT, 3, [prose(2)]), [1, 2])
    assert (merged.engine, merged.pages) == ("pdfium", [prose(1), prose(2), ""])
    ocr = complete("ocr", prose(1))
    assert add_ocr(None, ocr, [0]) is ocr


def test_removed_lines_are_counted() -> None:
    extraction = select_from(complete("pdfium", *[f"The report\n{prose(n)}\n{n}" for n in range(1, 5)]))
    assert extraction.removed == {"headers": 4, "page_numbers": 4}
