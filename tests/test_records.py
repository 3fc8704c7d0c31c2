from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_documents

from pdf2lora.documents.records import Document, read_documents
from pdf2lora.documents.text import text_sha256


def document(text: str, name: str = "a.pdf") -> Document:
    return Document(
        id=name,
        sha256=text_sha256(name),
        num_pages=1,
        pages_read=1,
        engine="pypdf2",
        attempts={"pypdf2": "complete"},
        characters_raw=len(text),
        characters=len(text),
        reason=None,
        text=text,
    )


@pytest.mark.parametrize(
    "text",
    ["", "plain", 'a "quoted" \\ text', "one\ntwo\r\nthree\rfour", "\u2028 \u2029 \u0085 \x0b\x0c", "海 🌊 é ﬁ \u200c"],
)
def test_documents_survive_a_round_trip(tmp_path: Path, text: str) -> None:
    left_out = replace(document(""), reason="encrypted", engine=None, num_pages=None, attempts={})
    documents = [document(text, f"Käse/{text}.pdf"), left_out, document("another")]
    write_documents(tmp_path / "documents.jsonl", documents)
    assert list(read_documents(tmp_path / "documents.jsonl")) == documents
    assert (tmp_path / "documents.jsonl").read_bytes().count(b"\n") == 3


def test_letters_are_not_escaped(tmp_path: Path) -> None:
    write_documents(tmp_path / "documents.jsonl", [document("海が")])
    assert "海が".encode() in (tmp_path / "documents.jsonl").read_bytes()
