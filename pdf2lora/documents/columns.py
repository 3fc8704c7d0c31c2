"""Reading order of a page whose two text columns are drawn row by row.

Some programs draw a row of the left column, then the same row of the right column. In the text, half sentences of the
two columns then alternate. The positions of the text pieces show the columns.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

MAX_BOXES = 2000  # of a page; the time grows with the square of their number
MIN_ROWS = 6  # in each column
MIN_WIDTH = 0.35  # a column has at least 35% of the width of the page
FULL_LINE = 0.7  # a line of text fills 70% of its column; the cells of a table are shorter
FULL_LINES_SHARE = 0.6  # of the lines of each column
ALTERNATION_SHARE = 0.8  # of the rows: after the left piece, the page draws the right one


class Box(NamedTuple):
    """The bounding box of a piece of text on one line, in points. The y axis goes up."""

    left: float
    bottom: float
    right: float
    top: float


def union(boxes: Sequence[Box]) -> Box:
    """Returns the smallest box around the boxes."""
    lefts, bottoms, rights, tops = zip(*boxes, strict=True)
    return Box(min(lefts), min(bottoms), max(rights), max(tops))


def has_center(box: Box, other: Box) -> bool:
    """Whether the center of the other box is in the box."""
    x, y = (other.left + other.right) / 2, (other.bottom + other.top) / 2
    return box.left <= x <= box.right and box.bottom <= y <= box.top


@dataclass
class _Line:
    side: str  # left, right or both
    box: Box
    pieces: list[int]


def column_order(boxes: Sequence[Box]) -> list[list[int]] | None:
    """Returns the lines of the page, each a list of indices in `boxes`, in reading order.

    boxes: in drawing order.
    Returns None if the page does not have two columns drawn row by row.
    """
    num_steps_right = sum(
        box.right <= following.left and same_row(box, following) for box, following in pairwise(boxes)
    )
    is_candidate = num_steps_right >= MIN_ROWS and len(boxes) <= MAX_BOXES
    gutter = _gutter(boxes) if is_candidate else None
    if gutter is None:
        return None
    lines = _lines(boxes, gutter)
    left = [line for line in lines if line.side == "left"]
    right = [line for line in lines if line.side == "right"]
    width = max(box.right for box in boxes) - min(box.left for box in boxes)
    if not (_is_column(left, width) and _is_column(right, width)):
        return None
    num_rows = sum(any(same_row(line.box, other.box) for other in right) for line in left)
    sides = [_side(box, gutter) for box in boxes]
    num_alternations = sum(pair == ("left", "right") for pair in pairwise(sides))
    if num_rows < MIN_ROWS or num_alternations < ALTERNATION_SHARE * num_rows:
        return None
    return [line.pieces for line in _read_by_column(lines)]


def _gutter(boxes: Sequence[Box]) -> float | None:
    """Returns the x of a vertical line in the middle of the page that crosses the fewest boxes, at most 30%."""
    start, end = min(box.left for box in boxes), max(box.right for box in boxes)
    candidates = [start + (end - start) * step / 80 for step in range(24, 57)]
    wide = [box for box in boxes if box.left < box.right]
    lefts, rights = sorted(box.left for box in wide), sorted(box.right for box in wide)
    crossings = [bisect_left(lefts, x) - bisect_right(rights, x) for x in candidates]  # left < x < right
    fewest = min(crossings)
    if fewest > 0.3 * len(boxes):
        return None
    best = [x for x, count in zip(candidates, crossings, strict=True) if count == fewest]
    return best[len(best) // 2]


def _side(box: Box, gutter: float) -> str:
    return "left" if box.right <= gutter else "right" if box.left >= gutter else "both"


def same_row(one: Box, other: Box) -> bool:
    height = min(one.top - one.bottom, other.top - other.bottom)
    return min(one.top, other.top) - max(one.bottom, other.bottom) > 0.5 * height


def _lines(boxes: Sequence[Box], gutter: float) -> list[_Line]:
    """Joins neighboring pieces of the same row and side. Returns the lines from top to bottom."""
    lines: list[_Line] = []
    last: dict[str, _Line] = {}
    for number, box in enumerate(boxes):
        side = _side(box, gutter)
        line = last.get(side)
        if line and same_row(line.box, box):
            line.pieces.append(number)
            line.box = union([line.box, box])
        else:
            last[side] = _Line(side, box, [number])
            lines.append(last[side])
    return sorted(lines, key=lambda line: -line.box.top)


def _is_column(lines: Sequence[_Line], page_width: float) -> bool:
    if len(lines) < MIN_ROWS:
        return False
    width = max(line.box.right for line in lines) - min(line.box.left for line in lines)
    num_full = sum(line.box.right - line.box.left >= FULL_LINE * width for line in lines)
    return width >= MIN_WIDTH * page_width and num_full >= FULL_LINES_SHARE * len(lines)


def _read_by_column(lines: Sequence[_Line]) -> list[_Line]:
    """Reads the left column, then the right one. A line over both columns ends the columns above it."""
    order: list[_Line] = []
    right: list[_Line] = []
    for line in lines:
        if line.side == "both":
            order += [*right, line]
            right = []
        elif line.side == "right":
            right.append(line)
        else:
            order.append(line)
    return order + right
