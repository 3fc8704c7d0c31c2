"""Helpers for all tests. They do not import torch, which takes seconds."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pdf2lora.documents.records import Document, write_through

REPOSITORY = Path(__file__).resolve().parents[1]


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    for _ in write_through(file, documents):
        pass


def wait_until(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
