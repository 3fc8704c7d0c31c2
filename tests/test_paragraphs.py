from pdf2lora.documents.columns import Box
from pdf2lora.documents.paragraphs import order_of_vertical_lines, paragraph_starts


def line(y: float, left: float = 72, height: float = 12) -> Box:
    return Box(left, y, left + 5, y + height)


def starts(*boxes: Box | None) -> list[int]:
    return [number for number, is_start in enumerate(paragraph_starts(boxes)) if is_start]


def test_lines_at_equal_distances_are_one_paragraph() -> None:
    assert starts(*[line(700 - 13 * number) for number in range(8)]) == []
    assert starts(*[line(700 - 26 * number) for number in range(8)]) == []  # double-spaced


def test_lines_that_run_down_are_read_from_right_to_left() -> None:
    tops = [line(700, left) for left in (72, 100, 128, 156)]
    bottoms = [line(400, left) for left in (72, 100, 128, 156)]
    ends = [line(700, 300) for _ in range(4)]
    assert order_of_vertical_lines(tops, bottoms) == [3, 2, 1, 0]
    assert order_of_vertical_lines(tops[::-1], bottoms[::-1]) == [0, 1, 2, 3]
    assert order_of_vertical_lines(tops, ends) == [0, 1, 2, 3]
    assert order_of_vertical_lines([*tops, None, *tops], [ends[0], *bottoms[1:], None, *bottoms]) == [
        *(0, 3, 2, 1),
        *(4, 8, 7, 6, 5),
    ]


def test_a_gap_starts_a_paragraph() -> None:
    ys = [700, 687, 674, 640, 627, 614]
    assert starts(*map(line, ys)) == [3]


def test_the_lines_of_a_heading_have_no_gap_between_them() -> None:
    body = [line(640 - 12 * number, height=12) for number in range(6)]
    assert starts(line(700, height=20), line(680, height=20), *body) == [2]


def test_an_indent_starts_a_paragraph() -> None:
    lefts = [72, 72, 86, 72, 72, 86, 72]
    assert starts(*[line(700 - 13 * number, left) for number, left in enumerate(lefts)]) == [2, 5]


def test_an_indented_block_is_one_paragraph() -> None:
    lefts = [72, 72, 90, 90, 90, 72, 72]
    assert starts(*[line(700 - 13 * number, left) for number, left in enumerate(lefts)]) == []


def test_the_top_of_the_next_column_starts_no_paragraph() -> None:
    assert starts(line(700), line(687), line(674), line(700, 320), line(687, 320), line(674, 320)) == []


def test_blank_lines_have_no_position() -> None:
    assert starts(line(700), None, line(687), line(674)) == []
    assert starts() == []
