"""The training text of the demo model: public-domain books without line breaks, cut into pieces and split by book."""

import gzip
import re
from pathlib import Path

PIECE_CHARACTERS = 5000
HELD_OUT_EVERY = 13  # one book in 13 is held out


def read_books(folder: Path) -> list[str]:
    """The books in `general-NN.txt.gz`: UTF-8 text, separated by form feeds. Very short ones are dropped."""
    files = sorted(folder.glob("general-*.txt.gz"))
    if not files:
        raise SystemExit(f"error: {folder} has no general-NN.txt.gz")
    books = [book for file in files for book in gzip.decompress(file.read_bytes()).decode("utf-8").split("\f")]
    return [book for book in books if len(book) > PIECE_CHARACTERS]


def unwrap(book: str) -> list[str]:
    """The paragraphs of a book, each on one line. Indented blocks (verse, tables) keep their line breaks."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", book.replace("\r\n", "\n")):
        lines = block.strip("\n").split("\n")
        is_indented = sum(line.startswith("  ") for line in lines) > len(lines) / 2
        text = "\n".join(line.strip() for line in lines) if is_indented else " ".join(" ".join(lines).split())
        if text:
            paragraphs.append(text)
    return paragraphs


def pieces(book: str) -> list[str]:
    """Cuts a book at paragraph ends into documents of about PIECE_CHARACTERS, so that training has many beginnings.

    A blank line separates paragraphs, as in the text that extract writes.
    """
    documents, current, length = [], [], 0
    for paragraph in unwrap(book):
        current.append(paragraph)
        length += len(paragraph)
        if length > PIECE_CHARACTERS:
            documents.append("\n\n".join(current))
            current, length = [], 0
    if current:
        documents.append("\n\n".join(current))
    return documents


def train_and_held_out(folder: Path) -> tuple[list[str], list[str]]:
    """Pieces for training and held-out pieces. All pieces of a book are in one of the two."""
    train: list[str] = []
    held_out: list[str] = []
    for number, book in enumerate(read_books(folder)):
        (held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).extend(pieces(book))
    return train, held_out
