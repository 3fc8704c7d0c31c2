"""The prose that the demo model is trained on: public-domain books, unwrapped, cut into pieces, split by book."""

import gzip
import re
from pathlib import Path

PIECE_CHARACTERS = 5000
HELD_OUT_EVERY = 13  # one book in thirteen is never trained on


def read_books(folder: Path) -> list[str]:
    """Reads `general-NN.txt.gz`: UTF-8 text, books separated by form feeds."""
    files = sorted(folder.glob("general-*.txt.gz"))
    if not files:
        raise SystemExit(f"no general-NN.txt.gz in {folder}")
    books = [book for file in files for book in gzip.decompress(file.read_bytes()).decode("utf-8").split("\f")]
    return [book for book in books if len(book) > PIECE_CHARACTERS]


def unwrap(book: str) -> list[str]:
    """Paragraphs of a hard-wrapped book, each on one line; indented blocks (verse, tables) keep their line breaks."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", book.replace("\r\n", "\n")):
        lines = block.strip("\n").split("\n")
        set_apart = sum(line.startswith("  ") for line in lines) > len(lines) / 2
        text = "\n".join(line.strip() for line in lines) if set_apart else " ".join(" ".join(lines).split())
        if text:
            paragraphs.append(text)
    return paragraphs


def pieces(book: str) -> list[str]:
    """Cuts a book at paragraph ends into documents of about PIECE_CHARACTERS, so that beginnings are seen often.

    A blank line stands between paragraphs, as in the text that extract writes.
    """
    cut, current, length = [], [], 0
    for paragraph in unwrap(book):
        current.append(paragraph)
        length += len(paragraph)
        if length > PIECE_CHARACTERS:
            cut.append("\n\n".join(current))
            current, length = [], 0
    if current:
        cut.append("\n\n".join(current))
    return cut


def train_and_held_out(folder: Path) -> tuple[list[str], list[str]]:
    """Pieces to train on and pieces to measure on; a book is wholly on one side."""
    train: list[str] = []
    held_out: list[str] = []
    for number, book in enumerate(read_books(folder)):
        (held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).extend(pieces(book))
    return train, held_out
