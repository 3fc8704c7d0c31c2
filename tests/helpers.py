"""Helpers for all tests. They do not import torch, which takes seconds."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdf2lora.documents.records import COMPLETE, Document, write_through
from pdf2lora.documents.text import text_sha256

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = (
    "sea ice river rain heat cloud wind coast forest soil harvest city grid carbon storm drought flood glacier ocean "
    "model season decade region policy energy report measure cause change level growth loss risk demand supply"
)


def prose(seed: int, num_words: int = 120) -> str:
    """Random common words, different for each seed, in lines of at most 12 words."""
    rng = random.Random(seed)
    words = rng.choices(VOCABULARY.split(), k=num_words)
    lines = [" ".join(words[start : start + 12]) for start in range(0, num_words, 12)]
    return "\n".join(lines).capitalize() + "."


def make_document(name: str, text: str, **changes: Any) -> Document:
    """A kept document of one page."""
    document = Document(
        id=name,
        sha256=text_sha256(name + text),
        num_pages=1,
        pages_read=1,
        engine="pdfium",
        attempts={"pdfium": COMPLETE},
        characters_raw=len(text),
        characters=len(text),
        text=text,
    )
    return replace(document, **changes)


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    for _ in write_through(file, documents):
        pass


def wait_until(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
