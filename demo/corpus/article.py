"""One text of the corpus: a markdown file with a front matter, as a title and a list of blocks."""

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
    number: int  # the file name's leading number: it decides the theme and the style
    name: str
    title: str
    running: str
    two_columns: bool
    blocks: tuple[Block, ...]


def read_article(path: Path) -> Article:
    """Reads `NN-name.md`; a file without the three lines of front matter is an error."""
    match = FRONT_MATTER.fullmatch(path.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{path}: expected a front matter between two lines of ---")
    fields = dict(line.split(": ", 1) for line in match[1].splitlines())
    if fields.keys() != {"title", "running", "layout"} or fields["layout"] not in ("one-column", "two-column"):
        raise ValueError(f"{path}: expected title, running and layout (one-column or two-column), found {fields}")
    return Article(
        number=int(path.stem.split("-")[0]),
        name=path.stem,
        title=fields["title"],
        running=fields["running"],
        two_columns=fields["layout"] == "two-column",
        blocks=tuple(parse_blocks(match[2])),
    )


def parse_blocks(markdown: str) -> list[Block]:
    """Splits at blank lines; a paragraph that opens with `Table N.` after a table is its caption."""
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
