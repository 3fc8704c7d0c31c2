import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdf2lora.documents import cleaning
from pdf2lora.documents.characters import KEPT_FORMATS


def clean(pages: list[str]) -> str:
    return cleaning.clean(pages).text


BODY = "The sea is warmer than it was and the ice is thinner"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("The e\ufb03cient \ufb01sh over\ufb02ows", "The efficient fish overflows"),
        ("cafe\u0301 m\u00b2 \uff21\uff22 \u2460", "café m² AB ①"),
        ("a\u00a0b\u2009c\u3000d\te", "a b c d e"),
        ("caf\u0065\u200b\u0301 x\u1100-\n\u1161", "café x가"),
    ],
    ids=["ligatures", "forms", "blanks", "composed_at_last"],
)
def test_compatibility_characters_become_plain(page: str, text: str) -> None:
    assert clean([page]) == text


def test_tex_control_codes_become_ligatures() -> None:
    page = "di\x0berence, \x0crst, in\ruence, e\x0ecient, ba\x0fing"
    assert clean([page]) == "difference, first, influence, efficient, baffling"


def test_a_tex_code_can_start_a_word() -> None:
    assert clean(["e\x0ecient \x0clters, \row and \rux"]) == "efficient filters, flow and flux"


def test_a_carriage_return_is_a_line_end_without_other_tex_codes() -> None:
    assert clean([f"{BODY}\rthan ever."]) == f"{BODY} than ever."


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems(end: str) -> None:
    assert clean([end.join([BODY, "than ever before.", "", "A second paragraph", ""])]) == (
        f"{BODY} than ever before.\n\nA second paragraph"
    )


@pytest.mark.parametrize(
    "cut",
    ["\x02", "\x02\n", "\x02\r\n", "\ufffe", "\ufffe\r\n", "\u00ad\n", "\u00ad\r\n", "-\n", "\u2010\n", "- \n", "¬\n"],
)
def test_a_word_hyphenated_at_a_line_end_is_joined(cut: str) -> None:
    assert clean([f"the adap{cut}tation of forests"]) == "the adaptation of forests"


def test_soft_hyphens_inside_a_line_are_removed() -> None:
    assert clean(["cli\u00admate ad\u00adaptation"]) == "climate adaptation"


def test_a_word_hyphenated_at_a_page_end_is_joined() -> None:
    assert clean(["the adap-", "tation of forests"]) == "the adaptation of forests"


def test_a_compound_that_occurs_elsewhere_keeps_its_hyphen() -> None:
    assert (
        clean(["the long-\nterm plan", "and other long-term plans"]) == "the long-term plan and other long-term plans"
    )


def test_a_text_that_breaks_only_compounds_keeps_all_hyphens() -> None:
    """As word processors break lines if automatic hyphenation is off."""
    page = "the long-\nterm plan, long-term costs and co-\nbenefits of low-\ncarbon power"
    assert clean([page]) == "the long-term plan, long-term costs and co-benefits of low-carbon power"


def test_a_text_that_also_breaks_words_joins_unknown_ones() -> None:
    page = "the long-\nterm plan, long-term costs, the cli-\nmate and other climate adap-\ntation"
    assert clean([page]) == "the long-term plan, long-term costs, the climate and other climate adaptation"


def test_a_hyphen_before_a_capital_stays() -> None:
    assert clean(["the Inter-\nAmerican bank"]) == "the Inter-American bank"


@pytest.mark.parametrize("page", ["a well-known fact", "1990-2020", "a dash - and another – here"])
def test_hyphens_inside_a_line_stay(page: str) -> None:
    assert clean([page]) == page


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("COVID-\n19", "COVID-19"),
        ("the mid-\n2020s", "the mid-2020s"),
        ("inter-\nnatio-\nnal", "international"),
        ("state-of-\nthe-art", "state-of-the-art"),
        ("long-term plans. Long-\nterm plans", "long-term plans. Long-term plans"),
        ("ADAP-\nTATION and adaptation", "ADAPTATION and adaptation"),
        ("the EU-\nETS", "the EU-ETS"),
        ("the day-to-\nday work of today", "the day-to-day work of today"),
        ("co-op-\neration in operation", "co-operation in operation"),
        ("short-\nand long-term plans", "short- and long-term plans"),
        ("short-\nor long-term, near-\nto\nmid-term", "short- or long-term, near- to mid-term"),
        ("the equat-\nor in", "the equator in"),
        ("a state-\nof-the-art map, mother-\nin-law", "a state-of-the-art map, mother-in-law"),
        ("an out-\nof-date map of the cli-\nmate", "an out-of-date map of the climate"),
        ("a T-\ncell, an X-\nray", "a T-cell, an X-ray"),
        ("c'est-\nà-dire, arc-\nen-ciel", "c'est-à-dire, arc-en-ciel"),
        ("l'é-\ncole", "l'école"),
        ("an e-\nmail, email", "an email, email"),
        ("תל-\nאביב", "תל-אביב"),
        ("中国-\n美国", "中国-美国"),
        ("ind-\nog udførsel", "ind- og udførsel"),
        ("https://www.unep.org/climate-\nchange", "https://www.unep.org/climate-change"),
        ("water/sani-\ntation", "water/sanitation"),
        ("by mid-cen-\ntury, a century", "by mid-century, a century"),
        ("Ein-\nund Ausfuhr", "Ein- und Ausfuhr"),
        ("a thous-\nand, one thousand", "a thousand, one thousand"),
        ("peer-\nto-peer, 10-\nto-20", "peer-to-peer, 10-to-20"),
        ("10-\nand 20-year plans", "10- and 20-year plans"),
        ("a 10-\nyear plan", "a 10-year plan"),
        ("CO2-\nequivalent, N2O-\nrich", "CO2-equivalent, N2O-rich"),
        ("the 20th-\ncentury mean", "the 20th-century mean"),
        ("U.S.-\nbased, (GHG)-\nfree, 5%–\n10%", "U.S.-based, (GHG)-free, 5%–10%"),
        ("www.sea-\nlevel.org/a_very-\nlong", "www.sea-level.org/a_very-long"),
        ("1850-\n1900 and 2011–\n2020", "1850-1900 and 2011–2020"),
        ("the ocean–\natmosphere system", "the ocean–atmosphere system"),
        ("the ocean –\nand the ice -\nis", "the ocean – and the ice - is"),
        ("and/\nor at https://\nexample.org/reports/\nsea.pdf", "and/or at https://example.org/reports/sea.pdf"),
    ],
)
def test_hyphens_at_line_ends(page: str, expected: str) -> None:
    assert clean([page]) == expected


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("cli\0mate", "climate"),
        ("the\x01cli\x1fmate", "the cli mate"),
        ("cli\u200bma\u2060te\ufeff", "climate"),
        ("نمی\u200cخواهم", "نمی\u200cخواهم"),
        ("\ue000 heat \uf8ff", "heat"),
        ("heat \ufffd\ufffd\ufffd\ufffd 12", "heat 12"),
        ("heat\ufffdwave", "heat wave"),
        ("heat \ud800 wave", "heat wave"),
    ],
    ids=["nul", "control", "zero_width", "joiner_stays", "private_use", "unknown_run", "unknown", "surrogate"],
)
def test_unreadable_characters_are_removed(page: str, text: str) -> None:
    assert clean([page]) == text


@pytest.mark.parametrize(
    "leader",
    ["........", " . . . . . . ", "………", "· · · · ·", "\ufffd\ufffd\ufffd\ufffd\ufffd", "___________", "..  ..  .."],
)
def test_dot_leaders_and_fill_in_blanks_are_removed(leader: str) -> None:
    assert clean([f"Introduction {leader} 12"]) == "Introduction 12"


def test_an_ellipsis_stays() -> None:
    assert clean(["and so on... and on"]) == "and so on... and on"


def pages_with(headers: list[str], footers: list[str]) -> list[str]:
    """A page for each header and footer, with a different sentence between them."""
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    sentences = [f"{BODY} on page {name}." for name in names]
    return ["\n".join(page) for page in zip(headers, sentences, footers, strict=False)]


def sentences_of(text: str) -> list[str]:
    return [paragraph.removeprefix(f"{BODY} on page ") for paragraph in text.split("\n\n")]


def test_running_headers_and_footers_with_numbers_are_removed() -> None:
    headers = [f"Chapter 2: The ocean {number}" for number in range(88, 94)]
    footers = [f"IPCC {number} Assessment Report" for number in range(1, 7)]
    text = clean(pages_with(headers, footers))
    assert "Chapter" not in text
    assert "Assessment" not in text
    assert text.count(BODY) == 6


def test_headers_of_left_and_right_pages_are_removed() -> None:
    text = clean(pages_with(["The ocean", "A. Author and B. Author"] * 4, [""] * 8))
    assert "The ocean" not in text
    assert "Author" not in text
    assert text.count(BODY) == 8


def test_headers_are_compared_without_case() -> None:
    text = clean(pages_with(["The Ocean", "THE OCEAN", "the ocean"], [""] * 3))
    assert "ocean" not in text.lower()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("7", "8"),
        ("- 7 -", "- 8 -"),
        ("Page 7", "Page 8"),
        ("page 7 of 12", "page 8 of 12"),
        ("p. 7", "p. 8"),
        ("S 7", "S 8"),
        ("7/12", "8/12"),
        ("[7]", "[8]"),
        ("viii", "ix"),
        ("XII", "XIII"),
        ("2041", "2042"),
        ("– xiv –", "– xv –"),
        ("", "2"),
        ("Page 1", ""),
    ],
)
def test_page_numbers_are_removed(first: str, second: str) -> None:
    expected = f"{BODY} here. {BODY} there."
    assert clean([f"{first}\n{BODY} here.", f"{second}\n{BODY} there."]) == expected
    assert clean([f"{BODY} here.\n{first}", f"{BODY} there.\n{second}"]) == expected


def test_a_line_on_one_page_stays() -> None:
    pages = pages_with(["Preface", "Methods", "Results", "Outlook"], [""] * 4)
    text = clean(pages)
    assert all(heading in text for heading in ("Preface", "Methods", "Results", "Outlook"))


def test_a_repeated_line_in_the_middle_of_pages_stays() -> None:
    lines = [
        "first line {n}",
        "second line {n}",
        "third line {n}",
        "Key message",
        "fourth {n}",
        "fifth {n}",
        "sixth {n}",
    ]
    names = ["alpha", "beta", "gamma", "delta"]
    text = clean(["\n".join(lines).replace("{n}", name) for name in names])
    assert text.count("Key message") == 4


def test_at_most_three_lines_are_removed_at_a_page_end() -> None:
    form = ["Ministry of the sea", "Department of ice", "Form for rivers", "Name of the river", "Length of the river"]
    text = clean(["\n".join([*form, name]) for name in ("Rhine", "Loire", "Tiber")])
    assert [text.count(line) for line in form] == [0, 0, 0, 3, 3]


def test_a_single_page_keeps_its_lines() -> None:
    assert clean([f"Page 7\n\n{BODY}.\n\n12"]) == f"Page 7\n\n{BODY}.\n\n12"


def test_printed_lines_become_paragraphs() -> None:
    page = (
        "The level of the sea rose by twenty centimetres\n"
        "in the course of the last century and it goes\n"
        "on rising.\n"
        "The rain of the summer fell within a few days of\n"
        "July in this region."
    )
    assert clean([page]) == (
        "The level of the sea rose by twenty centimetres in the course of the last century and it goes on rising.\n\n"
        "The rain of the summer fell within a few days of July in this region."
    )


def test_a_paragraph_continues_on_the_next_page() -> None:
    assert clean([BODY, "than it was before the year began."]) == f"{BODY} than it was before the year began."


def test_headings_and_list_items_are_separate_paragraphs() -> None:
    page = (
        "Results\n"
        "The level of the sea rose by twenty centimetres:\n"
        "1. The first cause is the heat of the water, which\n"
        "makes it wider.\n"
        "2. The second cause is the ice of the mountains.\n"
        "(a) The glaciers are smaller than they have been.\n"
        "• The ice sheets are thinner than they have been.\n"
        "- The snow is gone in the month of May already."
    )
    assert clean([page]).split("\n\n") == [
        "Results",
        "The level of the sea rose by twenty centimetres:",
        "1. The first cause is the heat of the water, which makes it wider.",
        "2. The second cause is the ice of the mountains.",
        "(a) The glaciers are smaller than they have been.",
        "• The ice sheets are thinner than they have been.",
        "- The snow is gone in the month of May already.",
    ]


@pytest.mark.parametrize("before", ["by Smith, P. and Jones,", "by Smith, P. &", "by P. Smith and"])
def test_the_initial_of_an_author_starts_no_list_item(before: str) -> None:
    page = f"The flow of rivers in the wet season {before}\nA. (2010) and by Miller, who worked in the mountains, too."
    assert clean([page]) == page.replace("\n", " ")


def test_the_initial_of_an_author_continues_a_short_line() -> None:
    lines = ["Smith, P. and Jones,", "A. (2010). The flow of rivers in the wet season, as seen in the mountains."]
    assert clean(["\n".join(lines)]) == " ".join(lines)


def test_items_after_a_comma_are_separate_paragraphs() -> None:
    lines = ["(a) The level of the sea,", "(b) the ice of the mountains,", "c. the rain of the summer."]
    assert clean(["\n".join(lines)]).split("\n\n") == lines


@pytest.mark.parametrize(
    "bullet", ["•", "●", "➢", "\uf0b7", "\uf0a7"], ids=["dot", "circle", "arrow", "symbol", "wingdings"]
)
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_bullets_start_list_items(bullet: str, gap: str) -> None:
    items = [
        "The level of the sea rose by twenty centimetres in",
        "a century.",
        "The ice of the mountains is thinner now",
    ]
    page = f"The causes are\n{bullet}{gap}{items[0]}\n{items[1]}\n{bullet}{gap}{items[2]}"
    sign = "•" if bullet > "\ue000" else bullet
    assert clean([page]).split("\n\n") == ["The causes are", f"{sign} {items[0]} {items[1]}", f"{sign} {items[2]}"]


def test_a_short_line_that_ends_in_a_colon_is_a_separate_paragraph() -> None:
    lines = ["The causes of the rise are:", "heat, which makes the water wider than it has been before,", "and ice."]
    assert clean(["\n".join(lines)]) == f"{lines[0]}\n\n{lines[1]} {lines[2]}"


@pytest.mark.parametrize("pages", [[], [""], ["", ""], ["\0\n \n\ufffd"], ["....."]])
def test_pages_without_text_result_in_an_empty_text(pages: list[str]) -> None:
    assert clean(pages) == ""


ODD_CHARACTERS = (
    "abyZ.-…·_:\n\n\n\r\t\f\x00\x02\x0b\x0c\x0e\x0f\ufffe\u00ad\u200b\u200c\ufb01\ufffd\ue000\u2028\u0085\u00a0\u0301\u00b4"
    "\u2010\u2011\u1100\u1161\u11a8é019•()ivx–½ﷺ\u3000\u2024\u0338=\ud800"
)


ODD_PAGES = st.lists(st.text(ODD_CHARACTERS, max_size=40), max_size=4)


LINES = st.lists(
    st.sampled_from(["Page 3", "the sea", "adap-", "tation.", "long-term", "1. one", "..", "____", BODY, ""]),
    max_size=8,
)


PRINTED_PAGES = st.lists(LINES.map("\n".join), max_size=4)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@example(["sea ..\n.. ice"])
@given(ODD_PAGES | PRINTED_PAGES | st.lists(st.text(max_size=40), max_size=4))
def test_cleaning_is_idempotent(pages: list[str]) -> None:
    text = clean(pages)
    assert clean([text]) == text
    assert text == unicodedata.normalize("NFC", text)
    assert not {"Cc", "Cf", "Co", "Cs"} & {unicodedata.category(c) for c in set(text) - {"\n"} - KEPT_FORMATS}
    assert all(line == " ".join(line.split()) for line in text.split("\n"))


WORDS = st.lists(st.text("abcdefghijklmnop", min_size=1, max_size=9), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(WORDS, st.integers(1, 9))
def test_joining_lines_keeps_all_words_in_order(words: list[str], words_per_line: int) -> None:
    lines = [" ".join(words[start : start + words_per_line]) for start in range(0, len(words), words_per_line)]
    assert clean(["\n".join(lines)]).split() == words


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, ("a" * 1000 + "-") * 1000, "ab cd ef\n" * 10**5, "....   " * 10**5, "ab-\n" * 10**5, "ﷺ" * 10**5],
    ids=["one word", "hyphens", "lines", "dots", "cuts", "ligatures"],
)
def test_cleaning_takes_linear_time(text: str) -> None:
    """Cleaning runs in the parent without a time limit. With quadratic time, the first text would take hours."""
    start_s = time.process_time()

    clean([text, text])

    assert time.process_time() - start_s < 20


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "模型模拟分析了降，风险将\n会增加农业。十年洪水",
            "模型模拟分析了降，风险将会增加农业。十年洪水",
        ),
        ("データと\nモデル", "データとモデル"),
        ("모델과 데이터를 사용하여 홍수 위험을\n분석했다", "모델과 데이터를 사용하여 홍수 위험을 분석했다"),
        ("使用HBV\n模型", "使用HBV 模型"),
    ],
    ids=["chinese", "japanese", "korean", "latin_name"],
)
def test_lines_are_joined_without_a_space_where_words_are_not_separated(page: str, text: str) -> None:
    assert clean([page]) == text


def test_superscripts_and_full_width_punctuation_stay() -> None:
    text = "10³ m³ per s, 2½ times x², CO₂ （观测）：数据，模型。"
    assert clean([text]) == text.replace(" （", "（")


def test_the_removed_parts_are_counted() -> None:
    pages = [
        f"The report\nThe {word} is warm\nand its adap-\ntation is\x01 ........ long.\nThe end of {word}\n{n}"
        for n, word in enumerate(["sea", "ice", "river", "soil"])
    ]
    assert cleaning.clean(pages).removed == {
        "characters": 4,
        "dot_leaders": 4,
        "headers": 4,
        "hyphens": 4,
        "page_numbers": 4,
    }
