"""Line numbers: drafts and preprints number each line, or each fifth line, in the margin."""

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

STEPS = (1, 5)
MIN_NUMBERS = 4  # on a page
MIN_SHARE = 0.6  # share of a page's lines that have a number, or are counted by the next number
MIN_PAGES = 0.5  # share of the pages that have line numbers; a table or a list is on fewer pages
MIN_PROSE = 0.5  # share of the lines that are prose. Such a line starts without a capital letter (most items of a list
PROSE_LETTERS = 8  # start with one) and has at least 8 letters (most rows of a table have fewer)
MAX_GAP = 3  # the largest step from one number to the next, because a number can be missing
_NUMBERED = re.compile(r"(\d{1,5})(?: +(.*))?")


def remove_line_numbers(pages: Sequence[Sequence[str]]) -> tuple[list[list[str]], int]:
    """Returns the lines of the pages without line numbers, and how many were removed.

    The numbers count by 1 or by 5, in at least half of the pages. Rows of a table and of a list that count stay, also
    those that count by years (2020, 2030).
    """
    for step in STEPS:
        numbered = [_numbered_lines(page, step) for page in pages]
        if sum(map(bool, numbered)) >= max(2, MIN_PAGES * len(pages)):
            return [_without(page, lines) for page, lines in zip(pages, numbered, strict=True)], sum(map(len, numbered))
    return list(map(list, pages)), 0


def _numbered_lines(page: Sequence[str], step: int) -> set[int]:
    """The places of the lines with a line number; empty if the page has none."""
    texts: list[str] = []
    numbers: dict[int, int] = {}
    rows: dict[int, int] = {}  # place of a line that starts with a number -> number of lines with text before it
    for place, line in enumerate(page):
        match = _NUMBERED.fullmatch(line)
        if match:
            numbers[place] = int(match[1])
            if match[2]:
                rows[place] = len(texts)
        if text := (match[2] if match else line):
            texts.append(text)
    chain = _longest_chain(numbers, step)
    if len(chain) < MIN_NUMBERS:
        return set()
    num_prose = sum(sum(map(str.isalpha, text)) >= PROSE_LETTERS and not text[0].isupper() for text in texts)
    is_numbered = (
        len(chain) * step >= MIN_SHARE * len(texts)
        and num_prose >= max(1, MIN_PROSE * len(texts))
        and all(numbers[place] % step == 0 for place in chain)
        and not _are_rows([rows[place] for place in chain if place in rows], step)
    )
    return set(chain) if is_numbered else set()


def _are_rows(lines: list[int], step: int) -> bool:
    """True if counted lines follow each other, as in a table. Line numbers by `step` are `step` lines apart."""
    return len(lines) > 1 and median(after - before for before, after in pairwise(lines)) < step / 2


def _longest_chain(numbers: dict[int, int], step: int) -> list[int]:
    """The places of the longest sequence in which each number is larger by step, or by up to MAX_GAP steps."""
    chains: dict[int, list[int]] = {}  # last number -> places
    for place, number in numbers.items():
        before = [number - step * gap for gap in range(1, MAX_GAP + 1)]
        chain = chains.pop(max(before, key=lambda last: len(chains.get(last, []))), [])
        chain.append(place)
        chains[number] = max(chain, chains.get(number, []), key=len)
    return max(chains.values(), key=len, default=[])


def _without(page: Sequence[str], places: set[int]) -> list[str]:
    lines = []
    for place, line in enumerate(page):
        if place not in places:
            lines.append(line)
        elif text := line.partition(" ")[2]:
            lines.append(text)
    return lines
