"""Hugging Face folders with tokenizer.model alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers import REPOSITORY
from tiny_llama import write_tiny_llama
from tokenizer_texts import TRICKY_TEXTS, train_sentencepiece
from transformers import AutoTokenizer

from pdf2lora.errors import InputError
from pdf2lora.tokens import Encoder
from pdf2lora.weights.conversion import convert
from pdf2lora.weights.huggingface_tokenizer import read_huggingface_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of 440 rows, and a sentencepiece file of 430 pieces."""
    folder = write_tiny_llama(tmp_path / "tiny", vocab_size=440)
    for name in ("tokenizer.json", "manifest.json"):
        (folder / name).unlink()
    shutil.copy(train_sentencepiece(tmp_path), folder / "tokenizer.model")
    return folder


def test_ids_equal_those_of_sentencepiece(source: Path, tmp_path: Path) -> None:
    expected = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}", "eos_token": "</s>"})
    )
    (tmp_path / "base").mkdir()

    convert(source, tmp_path / "base", llama_version=None, max_shard_gib=2)

    encoder = Encoder.load(tmp_path / "base")
    assert encoder.bos == 1
    for text, tokens in zip(TRICKY_TEXTS, encoder.encode(TRICKY_TEXTS), strict=True):
        assert tokens.tolist() == expected.EncodeAsIds(text), text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("The sea")["input_ids"] == [1, *expected.EncodeAsIds("The sea")]
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.eos_token == "</s>"


def test_without_add_bos_token_no_bos_is_written(source: Path) -> None:
    (source / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))

    tokenizer = read_huggingface_tokenizer(source, None, 440).tokenizer

    assert tokenizer.encode("").ids == []


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_get_their_ids(source: Path, file: str) -> None:
    added = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "2": {"content": "</s>", "special": True, "normalized": False},
                "430": {"content": "<|user|>", "special": True, "normalized": False},
                "431": {"content": "<|end|>", "special": False, "normalized": False},
            }
        },
        "added_tokens.json": {"<|end|>": 431, "<|user|>": 430},
    }
    (source / file).write_text(json.dumps(added[file]))

    tokenizer = read_huggingface_tokenizer(source, None, 440).tokenizer

    assert (tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("<|end|>")) == (430, 431)
    assert tokenizer.encode("<|user|>", add_special_tokens=False).ids == [430]


def test_a_gap_in_the_ids_is_refused(source: Path) -> None:
    (source / "added_tokens.json").write_text(json.dumps({"<|user|>": 435}))

    with pytest.raises(InputError, match=r"'<\|user\|>' has the id 435, but the next free id .* is 430"):
        read_huggingface_tokenizer(source, None, 440)


def test_more_tokens_than_rows_are_refused(source: Path) -> None:
    with pytest.raises(InputError, match=r"a token with the id 429, but the embedding has 400 rows"):
        read_huggingface_tokenizer(source, None, 400)


def test_a_special_token_needs_no_row(source: Path) -> None:
    """Old models with 32,000 rows have [PAD] as token 32,000. The pipeline never writes it."""
    (source / "added_tokens.json").write_text(json.dumps({"[PAD]": 430}))

    assert read_huggingface_tokenizer(source, None, 430).tokenizer.token_to_id("[PAD]") == 430


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|user|>": "430"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"430": "<|user|>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"430": {"special": True}}}),
    ],
)
def test_added_tokens_of_another_form_are_refused(source: Path, file: str, content: dict[str, Any]) -> None:
    (source / file).write_text(json.dumps(content))

    with pytest.raises(InputError, match=file):
        read_huggingface_tokenizer(source, None, 440)


def test_llama_3_s_file_needs_the_version(source: Path) -> None:
    shutil.copy(REPOSITORY / "models/source/demo/tokenizer.model", source)

    assert read_huggingface_tokenizer(source, "3.2", 4096).tokenizer.token_to_id("<|begin_of_text|>") == 3840
    with pytest.raises(InputError, match=r"Llama 3's tiktoken file, .* add the version to params.yaml: models.tiny"):
        read_huggingface_tokenizer(source, None, 4096)
