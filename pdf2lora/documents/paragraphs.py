"""Paragraphs of a page by the positions of its lines: a paragraph starts after a vertical gap or with an indent."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from pdf2lora.documents.columns import Box

MAX_LINE_STEP = 1.4  # times the median distance between two lines of the page: a longer distance is a gap,
MAX_HEIGHT_STEP = 1.1  # if it is also longer than 1.1 times the height of the line (headings are high)
MIN_INDENT = 0.5  # of the height of the line
SAME_ROW = 0.3  # times the height: two letters of a row have tops and bottoms that differ by less
RAISED_HEIGHT = 0.85  # times the height of the letter before it: a superscript is smaller
RAISED_BOTTOM = 0.15  # times the height of the letter before it: the bottom of a superscript is higher by more
RAISED_GAP = 0.3  # times the height of the letter before it: a superscript is not farther from it
DROP_CAP = 1.8  # times the height of normal letters: a drop cap, the large first letter of a chapter, is higher
SAME_LEFT = 0.1  # of the height: the lines above and below an indented line start at the same x


def paragraph_starts(first_letters: Sequence[Box | None]) -> list[bool]:
    """Returns for each line whether a paragraph starts with it.

    first_letters: the box of the first character of each line, as high as its font; None for a blank line.
    """
    bottoms = [box.bottom for box in first_letters if box]
    steps = [above - below for above, below in pairwise(bottoms) if above > below]
    step = median(steps) if steps else 0.0
    neighbors = zip([None, *first_letters], first_letters, [*first_letters[1:], None], strict=False)
    return [
        above is not None and box is not None and (_has_gap(above, box, step) or _is_indented(above, box, below))
        for above, box, below in neighbors
    ]


def order_of_vertical_lines(first_letters: Sequence[Box | None], last_letters: Sequence[Box | None]) -> list[int]:
    """Returns the numbers of the lines in reading order. Only lines that run down the page change their places.

    pdfium returns such lines from left to right. They are read from right to left: vertical Japanese and Chinese, and
    text that is rotated clockwise.
    """
    order: list[int] = []
    run: list[int] = []  # neighboring lines that run down, from left to right
    for number, (first, last) in enumerate(zip(first_letters, last_letters, strict=True)):
        before = first_letters[run[-1]] if run else None
        runs_down = (
            first and last and last.bottom < first.bottom and last.left < first.right and first.left < last.right
        )
        if not (first and before and runs_down and before.left < first.left):
            order += reversed(run)
            run = []
        (run if runs_down else order).append(number)
    return order + run[::-1]


def continues_row(first: Box, last: Box, box: Box) -> bool:
    """True if a line of pdfium belongs to the row before it. pdfium ends a line after a subscript or a footnote mark.

    first, last: letters of the line before; the last one can be small. box: the first letter of the line.
    """
    most = SAME_ROW * min(first.top - first.bottom, box.top - box.bottom)
    has_same_font = abs(first.bottom - box.bottom) < most and abs(first.top - box.top) < most
    return has_same_font and first.left < box.left and last.bottom < box.top and box.bottom < last.top


def is_raised(base: Box, last: Box, box: Box) -> bool:
    """Whether a letter is smaller than the base letter, raised, and next to the last letter."""
    height = base.top - base.bottom
    is_smaller = box.top - box.bottom < RAISED_HEIGHT * height
    is_higher = RAISED_BOTTOM * height < box.bottom - base.bottom < height
    return is_smaller and is_higher and box.left - last.right < RAISED_GAP * height


def is_drop_cap(letter: Box, box: Box) -> bool:
    """True if a letter is a drop cap. This is the large first letter of a chapter, with normal text to its right.

    box: the first letter of the normal text.
    """
    height = letter.top - letter.bottom
    is_at_the_left = letter.bottom < box.bottom < letter.top and 0 <= box.left - letter.left < 2 * height
    return is_at_the_left and height > DROP_CAP * (box.top - box.bottom)


def _has_gap(above: Box, box: Box, step: float) -> bool:
    height = box.top - box.bottom
    return above.bottom - box.bottom > max(MAX_LINE_STEP * step, MAX_HEIGHT_STEP * height)


def _is_indented(above: Box, box: Box, below: Box | None) -> bool:
    height = box.top - box.bottom
    return (
        below is not None
        and above.bottom > box.bottom > below.bottom
        and abs(above.left - below.left) < SAME_LEFT * height
        and box.left - below.left > MIN_INDENT * height
    )
