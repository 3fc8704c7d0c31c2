from pdf2lora.documents.columns import Box, column_order

ROWS = range(20)


def box(left: float, row: float, width: float) -> Box:
    return Box(left, 700 - 14 * row, left + width, 710 - 14 * row)


def left_column(row: int) -> Box:
    return box(50, row, 230 if row % 5 else 120)


def right_column(row: int) -> Box:
    return box(310, row, 232 if row % 4 else 150)


def test_columns_drawn_row_by_row_are_read_by_column() -> None:
    boxes = [side(row) for row in ROWS for side in (left_column, right_column)]
    assert column_order(boxes) == [[2 * row] for row in ROWS] + [[2 * row + 1] for row in ROWS]


def test_a_line_over_both_columns_separates_them() -> None:
    title, footer = box(50, -2, 490), box(200, 25, 200)
    boxes = [title, *(side(row) for row in ROWS for side in (left_column, right_column)), footer]
    order = column_order(boxes)
    assert order is not None
    assert (order[0], order[-1]) == ([0], [41])
    assert order[1:21] == [[1 + 2 * row] for row in ROWS]


def test_pieces_of_one_line_stay_together() -> None:
    boxes = [piece for row in ROWS for piece in (box(50, row, 100), box(155, row, 120), right_column(row))]
    order = column_order(boxes)
    assert order is not None
    assert order[:3] == [[0, 1], [3, 4], [6, 7]]


def test_columns_drawn_one_after_the_other_keep_their_order() -> None:
    assert column_order([left_column(row) for row in ROWS] + [right_column(row) for row in ROWS]) is None


def test_one_column_keeps_its_order() -> None:
    assert column_order([box(50, row, 490) for row in ROWS]) is None
    assert column_order([]) is None


def test_a_table_keeps_its_rows() -> None:
    assert (
        column_order([side for row in ROWS for side in (box(50, row, 90 + 9 * (row % 9)), box(310, row, 30))]) is None
    )
    names_and_texts = [side for row in ROWS for side in (box(50, row, 40 + 20 * (row % 8)), box(310, row, 230))]
    assert column_order(names_and_texts) is None
