import time

import pytest

from pdf2lora.documents.quality import has_codes, is_readable, is_right_to_left, num_word_errors

PROSE = "The sea is warmer than it was before, and a river that I know is dry in summer. "


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


def test_bullets_and_ticks_of_symbol_fonts_are_no_codes() -> None:
    slide = "\uf0b7 Less ice\n \uf0a7Warm sea\nwind \uf0fc \uf0fb\nrain  \uf0fc\n"
    assert not has_codes(slide)
    assert has_codes(slide.replace("Less ice", "\uf04c\uf065\uf073\uf073 \uf069\uf063\uf065"))
    assert has_codes("\uf074 \uf068 \uf065 \uf073 \uf065 \uf061")


def test_letters_shifted_to_other_letters_are_not_readable() -> None:
    assert is_readable("The climate is changing and we must act. " * 10)
    assert not is_readable("Wkh folpdwh lv fkdqjlqj dqg zh pxvw dfw. " * 10)


@pytest.mark.parametrize(
    "row",
    [
        "Gauge: 7 GWh, 3 MW, 5 kV, 9 kg, 2 mm, 4 hPa, 6 km",
        "20CrMnTi: c 1 Si 2 Mn 3 p 4 Ni 5 Mo 6 Al 7 Cu 8 Ti 9 Ni 1 Mo 2 Al 3",
        "ON 3, QC 4, NB 7, NS 2: 9 km, 3 kg",
        "Станция: выработка 7 GWh, мощность 3 MW, напряжение 5 kV, расход 9 kg, длина линии 4 km",
        "本年度发电量为7GWh,装机容量3MW,线路长度5km,电压9kV,煤耗2kg。",
    ],
    ids=["english", "steel", "provinces", "russian", "chinese"],
)
def test_tables_with_units_are_not_codes(row: str) -> None:
    assert not has_codes(f"{row}\n" * 40)


@pytest.mark.parametrize(
    "text",
    [
        "Let f be a map of a set X to a set Y and let x and y be points of X. Then f(x) = a p + b n for p > 2.",
        "x = y z, where i, j, k and n are integers; u v = w and t > 0 for each r in R.",
        "是 任 意 自 然 数 和 整 数",
    ],
    ids=["variables", "formulas", "chinese"],
)
def test_variables_are_words(text: str) -> None:
    assert is_readable(text * 5)


@pytest.mark.parametrize(
    ("one", "other", "errors"),
    [
        ("the car bon and the carbon", "the carbon and the carbon", (2, 0)),
        ("the carboncycle, a carbon cycle", "the carbon cycle, a carbon cycle", (1, 0)),
        ("ENG LISH and English", "ENGLISH and English", (2, 0)),
        ("t h e sea and the ice", "the sea and the ice", (3, 0)),
        ("the sea \ufffd\ufffd and \ufffd", "the sea", (2, 0)),
        ("the sea and the ice", "the sea", (0, 0)),
        ("a map of x to y", "a map of x to y", (0, 0)),
        ("2 003 years, 2003", "2003 years, 2003", (1, 0)),
        ("自 然 数", "自然数", (0, 0)),
    ],
    ids=["split", "glued", "other case", "letters", "unreadable", "longer", "equal", "digits", "chinese"],
)
def test_word_errors_are_differences_in_word_boundaries(one: str, other: str, errors: tuple[int, int]) -> None:
    assert num_word_errors(one, other) == errors
    assert num_word_errors(other, one) == errors[::-1]


def test_word_errors_of_a_hostile_text_take_seconds() -> None:
    """The comparison runs in the parent without a time limit."""
    start_s = time.process_time()
    num_word_errors(" ".join(map(str, range(10**6))), "a" * 10**6)
    num_word_errors("ab" * 10**6, "ab " * 10**6)
    assert time.process_time() - start_s < 10


def test_right_to_left_text_can_have_latin_names() -> None:
    assert is_right_to_left("הזרימה בנהר בשנת 2019 לפי מודל HBV של האגן")
    assert is_right_to_left("السلام عليكم")
    assert not is_right_to_left("The Hebrew word for water is מים and the rest is English.")
