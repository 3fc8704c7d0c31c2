"""Tokens counted in texts, and extrapolated."""

from tiny_llama import write_tiny_llama

from pdf2lora.preflight import token_count
from pdf2lora.preflight.token_count import count_tokens


def test_a_part_of_long_texts_is_counted(tmp_path, monkeypatch):
    tokenizer = write_tiny_llama(tmp_path) / "tokenizer.json"
    monkeypatch.setattr(token_count, "MAX_TOKENIZED_CHARACTERS", 150)

    assert count_tokens(["x" * 100] * 10, tokenizer) == (1020, False)
    assert count_tokens(["x" * 100], tokenizer) == (102, True)
