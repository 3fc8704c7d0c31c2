"""Replay text: its files, and text that evaluate scores."""

import json
from dataclasses import asdict

import pytest
from helpers import make_document, prose
from tiny_llama import write_texts

from pdf2lora.errors import InputError
from pdf2lora.runtime.parallel import Workers
from pdf2lora.split.replay import read_replay, require_unseen

TEXTS = [prose(1, 60), prose(2, 60), prose(3, 60)]


def record(**changes):
    return (json.dumps(asdict(make_document("a.pdf", "The sea")) | changes) + "\n").encode()


def check(tmp_path, replay, scored):
    with Workers() as workers:
        require_unseen(replay, scored, "the test documents", tmp_path, workers)


def test_reads_text_files_and_documents_of_pdfs(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text(TEXTS[0], encoding="utf-8")
    write_texts(tmp_path / "books/b.jsonl", TEXTS[1:])
    (tmp_path / "books/README.md").write_text("no text")
    (tmp_path / "books/folder.txt").mkdir()

    assert list(read_replay(tmp_path / "books")) == TEXTS


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("The sea rises.", encoding="utf-8-sig")

    assert list(read_replay(tmp_path)) == ["The sea rises."]


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.pdf").touch()

    with pytest.raises(InputError, match=r"train\.replay: .* has no text\. Put \.txt files there"):
        list(read_replay(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "Stra\xdfe".encode("latin-1"), r"a\.txt is not UTF-8 .*Convert it"),
        ("a.jsonl", b'{"text": "The sea"}\n', r"a line of .*a\.jsonl has not the format of data/documents\.jsonl"),
        ("a.jsonl", b"The sea\n", r"a line of .*a\.jsonl has not the format"),
        ("a.jsonl", b'"The sea"\n', r"a line of .*a\.jsonl has not the format"),
        ("a.jsonl", record(text=None), r"a line of .*a\.jsonl has not the format"),
        ("a.jsonl", record(text="\ud83d"), r"a line of .*a\.jsonl has not the format"),
        ("a.txt", b"sea " * 2_500_001, r"a\.txt has a document of 10,000,004 characters.*split -C 10M"),
    ],
    ids=["latin_1", "other_records", "no_json", "string", "null", "surrogate", "too_long"],
)
def test_a_file_in_another_format_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=words):
        list(read_replay(tmp_path))


def test_text_that_evaluate_scores_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.replay: 50\.\d% of the 13-word sequences of the test documents"):
        check(tmp_path, [TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[2]])


def test_other_text_is_fine(tmp_path):
    check(tmp_path, TEXTS[:2], [TEXTS[2]])
    check(tmp_path, TEXTS[:2], [])
