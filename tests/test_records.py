from pathlib import Path

import pytest
from helpers import make_document, write_documents

from pdf2lora.documents.records import read_documents


@pytest.mark.parametrize(
    "text",
    ["", "plain", 'a "quoted" \\ text', "one\ntwo\r\nthree\rfour", "\u2028 \u2029 \u0085 \x0b\x0c", "海 🌊 é ﬁ \u200c"],
)
def test_documents_survive_a_round_trip(tmp_path: Path, text: str) -> None:
    left_out = make_document("a.pdf", "", reason="encrypted", engine=None, num_pages=None, attempts={})
    documents = [make_document(f"Käse/{text}.pdf", text), left_out, make_document("a.pdf", "another")]
    write_documents(tmp_path / "documents.jsonl", documents)
    assert list(read_documents(tmp_path / "documents.jsonl")) == documents
    assert (tmp_path / "documents.jsonl").read_bytes().count(b"\n") == 3


def test_letters_are_not_escaped(tmp_path: Path) -> None:
    write_documents(tmp_path / "documents.jsonl", [make_document("a.pdf", "海が")])
    assert "海が".encode() in (tmp_path / "documents.jsonl").read_bytes()
