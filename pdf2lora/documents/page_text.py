"""The text of a page of pdfium: paragraphs, superscripts, and two columns in reading order.

pdfium returns the characters of a page in drawing order, and the position of each character.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from pdf2lora.documents.columns import Box, column_order, has_center
from pdf2lora.documents.paragraphs import (
    continues_row,
    is_drop_cap,
    is_raised,
    order_of_vertical_lines,
    paragraph_starts,
)

SPACE = 0.1  # times the height of a line: if the gap between two pieces of a row is wider, a space is written there
# The marks of two footnotes have a comma between them. pdfium can write a line end before a raised character.
MAYBE_RAISED = re.compile(r"\S(?:[\d+\-−–]|, ?|\r\n)*\d")
SUPERSCRIPTS = str.maketrans("0123456789+-−–", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻")
UPRIGHT = 0.99  # cosine of the angle of a character: a scan can be rotated a little
LINE_END = re.compile("\r\n|\n|(?<=\ufffe)(?!\r?\n)")  # pdfium writes U+FFFE for a hyphen at a line end
PROSE_LETTERS = 8  # in a column of prose, a line has at least 8 letters
PROSE_SHARE = 0.8  # in at least 80% of the lines


@dataclass(frozen=True)
class _Letters:
    """The characters of a page, and their positions."""

    text_page: Any
    text: str
    places: Sequence[int]  # of each character in pdfium's text, which counts UTF-16 units

    def box(self, index: int) -> Box:
        """Returns the box of a character, as high as its font."""
        return Box(*self.text_page.get_charbox(self._number(index), loose=True))

    def tight_box(self, index: int) -> Box:
        return Box(*self.text_page.get_charbox(self._number(index)))

    def is_upright(self, index: int) -> bool:
        from pypdfium2 import raw

        return math.cos(raw.FPDFText_GetCharAngle(self.text_page, self._number(index))) > UPRIGHT

    def _number(self, index: int) -> int:
        from pypdfium2 import raw

        return int(raw.FPDFText_GetCharIndexFromTextIndex(self.text_page, self.places[index]))


def text_in_reading_order(text_page: Any) -> tuple[str, bool]:
    """Returns the text of a page, and whether the order of its pieces is changed."""
    text, bounded = str(text_page.get_text_range()), str(text_page.get_text_bounded())
    if _num_visible(bounded) > _num_visible(text):
        return bounded, False  # the text with positions does not have the codes of a font without a Unicode map
    letters = _Letters(text_page, text, [0, *accumulate(1 + (character > "\uffff") for character in text)])
    if _num_visible(bounded) < _num_visible(text):
        letters = _inside_page(letters)
    letters = _with_superscripts(letters)
    boxes = [Box(*text_page.get_rect(number)) for number in range(text_page.count_rects())]
    order = column_order(boxes)
    if order is None:
        return _text_with_gaps(letters), False
    texts = _texts_of_boxes(letters, boxes)
    lines = [_join_pieces([(texts[number], boxes[number]) for number in line]) for line in order]
    num_prose_lines = sum(sum(map(str.isalpha, line)) >= PROSE_LETTERS for line in lines)
    if num_prose_lines < PROSE_SHARE * len(lines):  # the lines of a table of contents are also full, but of dots
        return _text_with_gaps(letters), False
    return "\n".join(lines), True


def _num_visible(text: str) -> int:
    return len("".join(text.split()))


def _inside_page(letters: _Letters) -> _Letters:
    """Returns the characters without those that are outside of the page, such as the marks of a printer."""
    page_box = Box(*letters.text_page.page.get_bbox())
    inside = [index for index in range(len(letters.text)) if has_center(page_box, letters.tight_box(index))]
    text = "".join(letters.text[index] for index in inside)
    return replace(letters, text=text, places=[letters.places[index] for index in inside])


def _texts_of_boxes(letters: _Letters, boxes: Sequence[Box]) -> list[str]:
    """Returns the text of each box: the characters that have their center in it.

    boxes: in drawing order. Spaces and line ends belong to the box before them.
    """
    texts = [""] * len(boxes)
    number = 0
    for index, character in enumerate(letters.text):
        if character not in " \r\n":
            box = letters.tight_box(index)
            following = (later for later in range(number, len(boxes)) if has_center(boxes[later], box))
            number = next(following, number)
        texts[number] += character
    return texts


def _join_pieces(pieces: Sequence[tuple[str, Box]]) -> str:
    """Joins the pieces of a line. pdfium also ends a line after a small character: there, a gap becomes a space."""
    line = pieces[0][0]
    for (before, box_before), (text, box) in pairwise(pieces):
        height = max(box.top - box.bottom, box_before.top - box_before.bottom)
        has_gap = box.left - box_before.right > SPACE * height
        line += f" {text}" if before.endswith("\n") and has_gap else text
    return line.replace("\r\n", "")


def _text_with_gaps(letters: _Letters) -> str:
    """Returns the text with a blank line before each paragraph that has a vertical gap or an indent above it."""
    text, letter = letters.text, letters.box
    lines = LINE_END.split(text)
    starts = [0, *(match.end() for match in LINE_END.finditer(text))]
    ends = [start + len(line.rstrip()) - 1 for start, line in zip(starts, lines, strict=True)]
    first_letters, last_letters = (
        [letter(index) if line.strip() else None for index, line in zip(indices, lines, strict=True)]
        for indices in (starts, ends)
    )
    order = order_of_vertical_lines(first_letters, last_letters)
    lines = [lines[number] for number in order]
    first_letters, last_letters = ([boxes[number] for number in order] for boxes in (first_letters, last_letters))
    is_start = paragraph_starts(first_letters)
    result = [lines[0]]
    for number, line in enumerate(lines[1:], 1):
        first, last, box = first_letters[number - 1], last_letters[number - 1], first_letters[number]
        above = result[-1].strip()
        if first and box and len(above) == 1 and above.isupper() and is_drop_cap(first, box):
            result[-1] = above + line
        elif first and last and box and continues_row(first, last, box):
            gap = " " if box.left - last.right > SPACE * (box.top - box.bottom) else ""
            result[-1] = result[-1].rstrip() + gap + line
        elif is_start[number] and not line.lstrip()[:1].islower():
            result += ["", line]
        else:
            result.append(line)
    return "\n".join(result)


def _with_superscripts(letters: _Letters) -> _Letters:
    """Writes raised digits and signs as superscripts: 10³, m⁻², and footnote marks. Subscripts stay.

    Rotated text has no superscripts: its letters are above each other.
    """
    text = letters.text
    characters = list(text)
    for match in MAYBE_RAISED.finditer(text):
        base = last = letters.box(match.start())
        for index in range(match.start() + 1, match.end()):
            if text[index].isspace():
                continue
            box = letters.box(index)
            if is_raised(base, last, box) and letters.is_upright(index):
                characters[index] = text[index].translate(SUPERSCRIPTS)
                if text[index - 1] == "\n":
                    characters[index - 2 : index] = ["", ""]
            else:
                base = box
            last = box
    places = [place for place, character in zip(letters.places, characters, strict=False) if character]
    return replace(letters, text="".join(characters), places=places)
