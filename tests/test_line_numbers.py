import pytest

from pdf2lora.documents.line_numbers import remove_line_numbers

LINES = [
    f"{word} warmer than it was and the ice is thinner" for word in ("is", "was", "gets", "The sea is", "stays")
] * 4


def numbered(*, step: int, page: int, restart: bool) -> list[str]:
    """The lines of a page, as an engine returns them: the number, a space and the line."""
    first = 1 if restart else page * len(LINES) + 1
    return [f"{n} {line}" if n % step == 0 else line for n, line in enumerate(LINES, start=first)]


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("step", [1, 5])
def test_line_numbers_before_lines_are_removed(step: int, restart: bool) -> None:
    pages = [["Header", *numbered(step=step, page=page, restart=restart), "", "7"] for page in range(3)]
    expected = [["Header", *LINES, "", "7"]] * 3
    assert remove_line_numbers(pages) == (expected, 3 * len(LINES) // step)


@pytest.mark.parametrize("step", [1, 5])
def test_line_numbers_after_the_lines_are_removed(step: int) -> None:
    numbers = [str(number) for number in range(step, len(LINES) + 1, step)]
    assert remove_line_numbers([[*LINES, *numbers]] * 2) == ([LINES] * 2, 2 * len(numbers))


def test_a_missing_number_does_not_matter() -> None:
    page = numbered(step=1, page=0, restart=True)
    assert remove_line_numbers([[*page[:7], LINES[7], *page[8:]]] * 2) == ([LINES] * 2, 2 * len(LINES) - 2)


@pytest.mark.parametrize(
    "page",
    [
        [f"{year} {year % 7}.{year % 5} mm and {year % 3}.1 m" for year in range(1980, 2010)],
        [f"{number} Village of the {number % 9} rivers in the valley" for number in range(1, 30)],
        [f"{number}. the sea is warmer than it was" for number in range(1, 30)],
        [f"{number} of the villages are near the sea" if number < 5 else LINES[0] for number in range(1, 30)],
        [str(number) for number in range(1, 30)],
    ],
    ids=["table", "list", "numbered_items", "few", "numbers"],
)
def test_rows_of_tables_and_lists_stay(page: list[str]) -> None:
    assert remove_line_numbers([page] * 3) == ([page] * 3, 0)


def test_numbered_lines_on_few_pages_stay() -> None:
    page = numbered(step=1, page=0, restart=True)
    assert remove_line_numbers([page, *[LINES] * 2]) == ([page, *[LINES] * 2], 0)


def test_years_in_a_table_stay() -> None:
    table = [f"{year} {number} 6 to 11" for number, year in enumerate((2020, 2030, 2040, 2050, 2100), start=8)]
    page = [*LINES[:8], "year rise in cm range", *table, *LINES[:8]]
    assert remove_line_numbers([page] * 2) == ([page] * 2, 0)
