"""Reads one text of the corpus: a Markdown file with front matter -> title and list of blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)


@dataclass(frozen=True)
class Heading:
    words: str


@dataclass(frozen=True)
class Paragraph:
    words: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    rows: tuple[tuple[str, ...], ...]  # the first row is the head
    caption: str


Block = Heading | Paragraph | Bullets | Table


@dataclass(frozen=True)
class Article:
    number: int  # at the start of the file name; selects theme and style
    name: str
    title: str
    running: str
    two_columns: bool
    blocks: tuple[Block, ...]


def read_article(path: Path) -> Article:
    """Reads `NN-name.md`.

    Raises:
        ValueError: the front matter does not have exactly title, running and layout.
    """
    match = FRONT_MATTER.fullmatch(path.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{path} has no front matter between two --- lines. Add it.")
    fields = dict(line.split(": ", 1) for line in match[1].splitlines())
    if fields.keys() != {"title", "running", "layout"} or fields["layout"] not in ("one-column", "two-column"):
        raise ValueError(f"{path} has {fields}; it must have title, running and layout (one-column or two-column).")
    return Article(
        number=int(path.stem.split("-")[0]),
        name=path.stem,
        title=fields["title"],
        running=fields["running"],
        two_columns=fields["layout"] == "two-column",
        blocks=tuple(parse_blocks(match[2])),
    )


def parse_blocks(markdown: str) -> list[Block]:
    """Splits at blank lines. A paragraph that starts with `Table N.` after a table is its caption."""
    blocks: list[Block] = []
    for chunk in re.split(r"\n\s*\n", markdown.strip()):
        lines = chunk.splitlines()
        previous = blocks[-1] if blocks else None
        if lines[0].startswith("## "):
            blocks.append(Heading(chunk.removeprefix("## ")))
        elif all(line.startswith("- ") for line in lines):
            blocks.append(Bullets(tuple(line.removeprefix("- ") for line in lines)))
        elif lines[0].startswith("|"):
            blocks.append(Table(tuple(table_cells(line) for line in lines if set(line) - set("|-: ")), caption=""))
        elif isinstance(previous, Table) and re.match(r"Table \d+\.", chunk):
            blocks[-1] = Table(previous.rows, caption=" ".join(lines))
        else:
            blocks.append(Paragraph(" ".join(lines)))
    return blocks


def table_cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
