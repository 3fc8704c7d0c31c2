"""Running lines: the headers, footers and page numbers that a document repeats on its pages."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

EDGE_LINES = 3  # running lines are among the first and last three lines of a page
RUNNING_SHARE = 0.4  # they are on at least 40% of the pages (left and right pages can differ),
MIN_CHAPTER_PAGES = 3  # or of the pages of a chapter; it has at least three of them
SAME_NUMBERS_SHARE = 0.6  # and at least 60% of them have the same numbers or count the pages

_PAGE_WORDS = "page|pages|pg|pag|pagina|página|[ps](?=[.\\s])|seite|sida|side|strana|strona|str|стр|страница|صفحة|עמוד"
_PAGE_NUMBER = re.compile(
    rf"\W*(?:(?:{_PAGE_WORDS})\W*)?(\d{{1,4}}|(?-i:[ivx]{{1,6}}|[IVX]{{1,6}}))"
    rf"(?:\s*(?:of|/|von|de|из)\s*\d{{1,4}})?\W*"  # Page 7 of 12
    rf"|\W*第?\s*(\d{{1,4}})\s*[页頁ページ]+\W*",
    re.IGNORECASE,
)
_BARE_NUMBER = re.compile(r"\W*\d{1,4}\W*")
_COUNTING_HEADING = re.compile(r"[^\W\d_]+\.? \d+\W*|第\s*\d+\s*\w")  # Article 7


def remove_running_lines(pages: list[list[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Removes headers, footers and page numbers at both ends of each page. A single page keeps all its lines.

    Returns the pages and the number of removed lines: headers, footers, page_numbers.
    """
    removed: Counter[str] = Counter()
    if len(pages) < 2:
        return pages, removed
    tops, bottoms = zip(*map(_edges, pages), strict=True)
    inner_lines = Counter(key for page in pages for key in {_key(line) for line in _inner_lines(page)})
    running = _chapter_lines(tops, bottoms, inner_lines) | dict.fromkeys(_running_keys(pages, inner_lines), -1)
    top = _PageEnd("headers", running, list(map(_page_numbers, tops)))
    bottom = _PageEnd("footers", running, list(map(_page_numbers, bottoms)))
    bodies = []
    for number, page in enumerate(pages):
        top_kinds = top.kinds_to_remove(page, number)
        body = page[len(top_kinds) :]
        bottom_kinds = bottom.kinds_to_remove(body[::-1], number)
        bodies.append(body[: len(body) - len(bottom_kinds)])
        removed.update(top_kinds + bottom_kinds)
    del removed["blank_lines"]
    return bodies, removed


@dataclass(frozen=True)
class _PageEnd:
    """The top or the bottom of all pages."""

    running_kind: Literal["headers", "footers"]
    first_pages: dict[str, int]  # key of a running line -> its first page, which keeps the line; -1 if no page keeps it
    page_numbers: list[set[int]]  # of each page: the numbers at this end that can be page numbers

    def kinds_to_remove(self, lines: Iterable[str], page: int) -> list[str]:
        """Returns the kinds of the lines to remove, from this end on: at most three, and blank lines between them."""
        kinds: list[str] = []
        for line in lines:
            kind = self.kind_of(line, page)
            if kind is None or len(kinds) - kinds.count("blank_lines") == EDGE_LINES:
                break
            kinds.append(kind)
        return kinds

    def kind_of(self, line: str, page: int) -> str | None:
        """Returns the kind of a line that is not part of the text. None for a line of the text."""
        if not line:
            return "blank_lines"
        if self._is_page_number(line, page):
            return "page_numbers"
        is_running = any(self.first_pages.get(key, page) < page for key in (_key(line), line.casefold()))
        return self.running_kind if is_running and not _BARE_NUMBER.fullmatch(line) else None

    def _is_page_number(self, line: str, page: int) -> bool:
        """Returns True for a number that counts the pages. Other numbers can belong to a table."""
        number = _page_number(line)
        if number is None:
            return False
        near = [step for step in (-2, -1, 1, 2) if 0 <= page + step < len(self.page_numbers)]
        return number == page + 1 or any(number + step in self.page_numbers[page + step] for step in near)


def _edges(page: list[str]) -> tuple[list[str], list[str]]:
    """Returns the first and the last lines of a page, without blank lines."""
    lines = [line for line in page if line]
    return lines[:EDGE_LINES], lines[-EDGE_LINES:]


def _inner_lines(page: list[str]) -> list[str]:
    return [line for line in page if line][EDGE_LINES:-EDGE_LINES]


def _running_keys(pages: list[list[str]], inner_lines: Counter[str]) -> set[str]:
    """Returns the keys of the lines that are running headers or footers.

    inner_lines: key -> number of pages that have such a line between their first and last lines.

    A table row, or a heading with a number (Article 1, Article 2), can be at the same place on many pages. Its numbers
    differ from page to page. A running line has the same numbers on each page, or counts the pages. A line of a list
    (countries of authors) can be at the end of many pages by chance. Then it is also in the middle of as many pages.
    """
    pages_of_key: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for number, page in enumerate(pages):
        for line in [line for edge in _edges(page) for line in edge]:
            pages_of_key[_key(line)].setdefault(number, line)
    return {
        key
        for key, lines in pages_of_key.items()
        if len(lines) >= max(2, RUNNING_SHARE * len(pages), inner_lines[key] + 1) and _number_kind(lines) != "other"
    }


def _chapter_lines(
    tops: Sequence[list[str]], bottoms: Sequence[list[str]], inner_lines: Counter[str]
) -> dict[str, int]:
    """Returns the keys of the running lines of single chapters, each with its first page, which keeps the line.

    A line at the bottom must also count the pages: other lines there can be the end of similar texts.
    """
    first_pages: dict[str, int] = {}
    for edges, must_count in ((tops, False), (bottoms, True)):
        pages_of_key: defaultdict[str, dict[int, str]] = defaultdict(dict)
        for number, lines in enumerate(edges):
            for line in lines:
                for key in {_key(line), line.casefold()}:  # the number of a chapter stays, that of a page counts
                    pages_of_key[key].setdefault(number, line)
        for key, pages in pages_of_key.items():
            num_expected = RUNNING_SHARE * (max(pages) - min(pages) + 1)
            is_frequent = len(pages) >= max(MIN_CHAPTER_PAGES, num_expected, inner_lines[key] + 1)
            if is_frequent and _number_kind(pages) in (("counting",) if must_count else ("constant", "counting")):
                first_pages[key] = min(pages)
    return first_pages


def _key(line: str) -> str:
    """Two lines that differ only in their numbers have the same key. A cleaned line has no character \0."""
    return re.sub(r"\d+", "\0", line).casefold()


def _number_kind(lines: dict[int, str]) -> Literal["constant", "counting", "other"]:
    """Returns whether the numbers in the lines stay the same, or some count the pages.

    lines: page -> the line of this page. All lines have the same key.
    """
    min_count = SAME_NUMBERS_SHARE * len(lines)
    columns = zip(*(re.findall(r"\d+", line) for line in lines.values()), strict=True)
    counts_pages = False
    for values in columns:
        if max(Counter(values).values()) >= min_count:
            continue
        offsets = Counter(int(value[:9]) - page for page, value in zip(lines, values, strict=True))
        if max(offsets.values()) < min_count:
            return "other"
        counts_pages = True
    if counts_pages and all(map(_COUNTING_HEADING.fullmatch, lines.values())):
        return "other"
    return "counting" if counts_pages else "constant"


def _page_numbers(lines: list[str]) -> set[int]:
    return {number for number in map(_page_number, lines) if number is not None}


def _page_number(line: str) -> int | None:
    """Returns the number of a line that can be a page number, such as 7, - vii -, p. 7 or 7/12."""
    match = _PAGE_NUMBER.fullmatch(line)
    if match is None:
        return None
    digits = match[1] or match[2]
    return int(digits) if digits.isdigit() else _roman_number(digits.lower())


def _roman_number(letters: str) -> int:
    values = [{"i": 1, "v": 5, "x": 10}[letter] for letter in letters]
    return sum(
        -value if value < following else value for value, following in zip(values, [*values[1:], 0], strict=True)
    )
