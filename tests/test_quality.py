import pytest
from conftest import prose

from pdf2lora.documents.quality import is_readable, select
from pdf2lora.documents.records import COMPLETE, Attempt, Extraction, Reason

CODES = "\x1b\x1c\x13\x15 \x11\x14 \x1e\x12 " * 20
READABLE = [f"{prose(1)}\n", prose(2)]
PROSE = "The sea is warmer than it was before, and a river that I know is dry in summer. "


def select_from(*attempts: Attempt, clean: bool = True, min_characters: int = 50) -> Extraction:
    return select(list(attempts), clean=clean, min_characters=min_characters)


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


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE + "\x0cgures and \x0bects",
        "Smith, J. A., Jones, B., Müller, C. D., Li, E. F. and Okafor, G. H.",
        "海の温度が上がっている。氷は前より薄い。",
        "Η θάλασσα είναι πιο ζεστή από πριν. Температура воды растёт.",
        PROSE * 4 + "pneumonoultramicroscopicsilicovolcanoconiosis",
    ],
    ids=["prose", "tex_ligatures", "authors", "cjk", "greek_and_russian", "one_long_word"],
)
def test_prose_is_readable(text: str) -> None:
    assert is_readable(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n ",
        "1990 2000 2010 | 3.5 4.1",
        "\x1b\x1c\x13\x15 \x11\x14the \x1e\x12\x13sea \x15\x16",
        PROSE + "\ue001\ue002\ue003\ue004 " * 3,
        PROSE + " \ufffd \ufffd \ufffd \ufffd",
        "t h e  s e a  i s  w a r m e r  t h a n",
        "the s e a is w a r m e r than it was before and the river is dry",
        "theseaiswarmerthanitwasbefore andtheiceisthinnerthanithasbeen today",
    ],
    ids=[
        "empty",
        "blank",
        "numbers",
        "shifted_codes",
        "private_use",
        "replacement_characters",
        "spaced_out",
        "partly_spaced_out",
        "glued",
    ],
)
def test_codes_spaced_out_and_glued_text_is_not_readable(text: str) -> None:
    assert not is_readable(text)


def test_letters_shifted_to_other_letters_are_not_readable() -> None:
    assert is_readable("The climate is changing and we must act. " * 10)
    assert not is_readable("Wkh folpdwh lv fkdqjlqj dqg zh pxvw dfw. " * 10)
