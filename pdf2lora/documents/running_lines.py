"""Running lines: the headers, footers and page numbers that a document repeats on its pages."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

EDGE_LINES = 3  # running lines are among the first and last three lines of a page
RUNNING_SHARE = 0.4  # they are on at least 40% of the pages (left and right pages can differ),
MIN_CHAPTER_PAGES = 3  # or of the pages of a chapter; it has at least three of them
SAME_NUMBERS_SHARE = 0.6  # and at least 60% of them have the same numbers or count the pages

_PAGE_WORDS = "page|pages|pg|pag|pagina|página|p|s|seite|sida|side|strana|strona|str|стр|страница|صفحة|עמוד"
_NUMBER = r"(?:\d{1,4}|[ivx]{1,6})"
_LABELED_PAGE_NUMBER = re.compile(
    rf"\W*(?:(?:{_PAGE_WORDS})\W*{_NUMBER}(?:\s*(?:of|/|von|de|из)\s*\d{{1,4}})?"  # Page 7 of 12
    rf"|\d{{1,4}}\s*(?:of|/)\s*\d{{1,4}}|[ivx]{{1,6}}"  # 7/12, vii
    rf"|第?\s*\d{{1,4}}\s*[页頁ページ]+)\W*",
    re.IGNORECASE,
)
_BARE_PAGE_NUMBER = re.compile(r"\W*(\d{1,4})\W*")
_COUNTING_HEADING = re.compile(r"[^\W\d_]+\.? \d+\W*|第\s*\d+\s*\w")  # Article 7


def remove_running_lines(pages: list[list[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Removes headers, footers and page numbers at both ends of each page. A single page keeps all its lines.

    Returns the pages and the number of removed lines: headers, footers, page_numbers.
    """
    removed: Counter[str] = Counter()
    if len(pages) < 2:
        return pages, removed
    tops, bottoms = zip(*map(_edges, pages), strict=True)
    running = _chapter_lines(tops, bottoms) | dict.fromkeys(_running_keys(pages), -1)
    top_numbers, bottom_numbers = list(map(_bare_numbers, tops)), list(map(_bare_numbers, bottoms))

    def kind(line: str, page: int, numbers: list[set[int]], running_kind: str) -> str | None:
        if not line:
            return "blank_lines"
        if _is_page_number(line, page, numbers):
            return "page_numbers"
        first_kept = min(running.get(key, page) for key in (_key(line), line.casefold()))
        is_running = first_kept < page and not _BARE_PAGE_NUMBER.fullmatch(line)
        return running_kind if is_running else None

    def num_removed(lines: Iterable[str], page: int, numbers: list[set[int]], running_kind: str) -> int:
        """Returns how many lines to remove, from the first on: at most three, and the blank lines between them."""
        kinds: list[str] = []
        for line in lines:
            name = kind(line, page, numbers, running_kind)
            if name is None or len(kinds) - kinds.count("blank_lines") == EDGE_LINES:
                break
            kinds.append(name)
        removed.update(kinds)
        return len(kinds)

    bodies = []
    for number, page in enumerate(pages):
        first = num_removed(page, number, top_numbers, "headers")
        last = len(page) - num_removed(reversed(page[first:]), number, bottom_numbers, "footers")
        bodies.append(page[first:last])
    del removed["blank_lines"]
    return bodies, removed


def _edges(page: list[str]) -> tuple[list[str], list[str]]:
    """Returns the first and the last lines of a page, without blank lines."""
    lines = [line for line in page if line]
    return lines[:EDGE_LINES], lines[-EDGE_LINES:]


def _running_keys(pages: list[list[str]]) -> set[str]:
    """Returns the keys of the lines that are running headers or footers.

    A table row, or a heading with a number (Article 1, Article 2), can be at the same place on many pages. Its numbers
    differ from page to page. A running line has the same numbers on each page, or counts the pages.
    """
    pages_of_key: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for number, page in enumerate(pages):
        for line in [line for edge in _edges(page) for line in edge]:
            pages_of_key[_key(line)].setdefault(number, line)
    return {
        key
        for key, lines in pages_of_key.items()
        if len(lines) >= max(2, RUNNING_SHARE * len(pages)) and _number_kind(lines) != "other"
    }


def _chapter_lines(tops: Sequence[list[str]], bottoms: Sequence[list[str]]) -> dict[str, int]:
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
            is_frequent = len(pages) >= max(MIN_CHAPTER_PAGES, RUNNING_SHARE * (max(pages) - min(pages) + 1))
            if is_frequent and _number_kind(pages) in (("counting",) if must_count else ("constant", "counting")):
                first_pages[key] = min(pages)
    return first_pages


def _key(line: str) -> str:
    """Two lines that differ only in their numbers have the same key."""
    return re.sub(r"\d+", "#", line).casefold()


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


def _bare_numbers(lines: list[str]) -> set[int]:
    return {int(match[1]) for match in map(_BARE_PAGE_NUMBER.fullmatch, lines) if match}


def _is_page_number(line: str, page: int, numbers: list[set[int]]) -> bool:
    """Returns True for a page number: one with a label, or one that continues the numbers of the pages near it.

    Other numbers without a label can belong to a table.

    numbers: the numbers without a label at this end of each page.
    """
    if _LABELED_PAGE_NUMBER.fullmatch(line):
        return True
    match = _BARE_PAGE_NUMBER.fullmatch(line)
    if match is None:
        return False
    near = [step for step in (-2, -1, 1, 2) if 0 <= page + step < len(numbers)]
    return len(numbers) < 3 or any(int(match[1]) + step in numbers[page + step] for step in near)
