import pytest

from pdf2lora.documents.running_lines import remove_running_lines

BODY = "The sea is warmer than it was and the ice is thinner"


def bodies(headers: list[str], footers: list[str] | None = None) -> tuple[list[list[str]], dict[str, int]]:
    """Returns the lines that stay of pages with these headers and footers, without the body, and the counts."""
    footers = footers or [""] * len(headers)
    names = ["one", "two", "three", "four"]
    pages = [
        [header, *(f"{BODY} {word} {names[n]}" for word in ("a", "b", "c")), footer]
        for n, (header, footer) in enumerate(zip(headers, footers, strict=True))
    ]
    kept, removed = remove_running_lines(pages)
    return [[line for line in page if not line.startswith(BODY)] for page in kept], dict(removed)


def test_headers_footers_and_page_numbers_are_counted() -> None:
    lines, removed = bodies(["The ocean"] * 4, [f"{n}" for n in range(7, 11)])
    assert lines == [[]] * 4
    assert removed == {"headers": 4, "page_numbers": 4}
    _, removed = bodies([""] * 4, [f"IPCC {n} Assessment Report" for n in range(4)])
    assert removed == {"footers": 4}


@pytest.mark.parametrize(
    "headers",
    [
        ["Article 1", "Article 2", "Article 3", "Article 4"],
        ["CHAPTER 3.", "CHAPTER 4.", "CHAPTER 5.", "CHAPTER 6."],
        ["第 1 条", "第 2 条", "第 3 条", "第 4 条"],
        [f"Gauge, year {year}: flow {flow}" for year, flow in ((1900, 31), (1920, 7), (1940, 99), (1960, 5))],
        ["Table 3 of 1990", "Table 9 of 1994", "Table 1 of 1990", "Table 4 of 1971"],
    ],
    ids=["articles", "chapters", "chinese_articles", "table_rows", "no_order"],
)
def test_table_rows_and_counting_headings_stay(headers: list[str]) -> None:
    lines, removed = bodies(headers)
    assert lines == [[header] for header in headers]
    assert removed == {}


@pytest.mark.parametrize(
    "headers",
    [
        ["FCCC/CP/2007/6/Add.1"] * 4,
        ["Chapter 2: The ocean 88", "Chapter 2: The ocean 89", "Chapter 2: The ocean 90", "Chapter 2: The ocean 91"],
        ["TSSM-1", "TSSM-2", "TSSM-3", "TSSM-4"],
        ["Page 1", "Page 2", "Page 3", "Page 4"],
        ["Seite 1 von 9", "Seite 2 von 9", "Seite 3 von 9", "Seite 4 von 9"],
        ["第 1 页", "第 2 页", "第 3 页", "第 4 页"],
        ["The ocean 7", "A. Author", "The ocean 9", "A. Author"],
    ],
    ids=["constant", "page_number", "label", "page", "seite", "chinese_page", "left_and_right"],
)
def test_lines_with_constant_numbers_or_page_numbers_are_removed(headers: list[str]) -> None:
    assert bodies(headers)[0] == [[]] * 4


def chapter_pages(top: str, bottom: str, num_pages: int = 30) -> list[list[str]]:
    """Pages with other text on each; {chapter} and {page} in top and bottom are numbers. A chapter has six pages."""
    letters = "abcdefghijklmnopqrstuvwxyzαβγδ"
    return [
        [
            top.format(chapter=number // 6 + 1, name=letters[number // 6] * 3, page=number + 1),
            *(f"{BODY} {letters[number]} {word}" for word in ("a", "b", "c")),
            bottom.format(chapter=number // 6 + 1, name=letters[number // 6] * 3, page=number + 1),
        ]
        for number in range(num_pages)
    ]


@pytest.mark.parametrize("top", ["Chapter {chapter}", "The {name} ocean", "{page} Chapter {chapter}. The {name} ocean"])
def test_headers_of_chapters_are_removed_but_the_first(top: str) -> None:
    kept, removed = remove_running_lines(chapter_pages(top, ""))
    headers = [(number, page[0]) for number, page in enumerate(kept) if not page[0].startswith(BODY)]
    assert [number for number, _ in headers] == [0, 6, 12, 18, 24]
    assert removed == {"headers": 25}


def test_footers_of_chapters_count_the_pages() -> None:
    assert remove_running_lines(chapter_pages("", "The {name} ocean | {page}"))[1] == {"footers": 25}
    assert remove_running_lines(chapter_pages("", "End of the {name} text"))[1] == {}


def test_bare_numbers_that_do_not_count_the_pages_stay() -> None:
    assert bodies([""] * 4, ["12", "7", "30", "2"])[0] == [["12"], ["7"], ["30"], ["2"]]
    assert bodies([""] * 4, ["12", "13", "30", "15"])[0] == [[], [], ["30"], []]


@pytest.mark.parametrize("number", ["352", "3/4", "(iv)", "Page 9"])
def test_numbers_that_count_no_pages_stay(number: str) -> None:
    assert bodies(["", ""], [number, ""])[0] == [[number], []]
    assert bodies([""] * 4, ["", number, "", ""])[0] == [[], [number], [], []]


def test_labels_of_a_table_are_not_page_numbers() -> None:
    pages = [["The storms", "S1", "S2", "S3"], ["The waves"], ["The winds", "P5"]]
    assert remove_running_lines(pages)[0] == pages


def test_a_single_page_keeps_its_lines() -> None:
    assert remove_running_lines([["Page 7", BODY, "12"]]) == ([["Page 7", BODY, "12"]], {})


def test_a_line_that_looks_like_the_key_of_a_number_stays() -> None:
    lines, _ = bodies(["#", "2", "3"], ["a", "b", "c"])
    assert lines[0] == ["#", "a"]


@pytest.mark.parametrize("numbers", [["\u0131", "\u0131\u0131", "\u0131v"], ["\u0130", "\u0130\u0130", "\u0130V"]])
def test_turkish_letters_are_not_roman_numbers(numbers: list[str]) -> None:
    lines, removed = bodies([""] * 3, numbers)
    assert [page[-1] for page in lines] == numbers
    assert removed == {}


def test_a_line_of_a_list_at_the_end_of_many_pages_stays() -> None:
    """Countries of authors: the same line is also in the middle of the pages."""
    pages = [[f"Author {name}", f"Institute {name}", "USA"] for name in "abcdefghijklmnop"]
    lists = [[line for author in pages[start : start + 4] for line in author] for start in range(0, 16, 4)]
    assert remove_running_lines(lists) == (lists, {})
