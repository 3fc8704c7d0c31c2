"""Llama 1's and 2's tokenizer.model against sentencepiece."""

import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_texts import KEY, TRICKY_TEXTS, load_auto, random_texts, train_sentencepiece

from pdf2lora.errors import InputError
from pdf2lora.weights.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def llama2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("llama2"))


def test_ids_are_those_of_sentencepiece(llama2_model: Path, tmp_path: Path) -> None:
    expected = sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))
    read_tokenizer(llama2_model, llama_version="2", key=KEY).write(tmp_path, context_length=4096)
    auto = load_auto(tmp_path)

    assert len(auto) == expected.GetPieceSize()
    for text in TRICKY_TEXTS + random_texts(1, 300):
        assert auto(text, split_special_tokens=True)["input_ids"] == [1, *expected.EncodeAsIds(text)], text
    text = " two  spaces\n\ttab 🙂 海 é"
    assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


def test_named_tokens(llama2_model: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(llama2_model, llama_version="1", key=KEY)
    tokenizer.write(tmp_path, context_length=2048)
    auto = load_auto(tmp_path)

    assert (auto.unk_token, auto.bos_token, auto.eos_token, auto.pad_token) == ("<unk>", "<s>", "</s>", "<unk>")
    assert tokenizer.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert auto("<s>", add_special_tokens=False)["input_ids"] == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 350},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["river"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_model_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = train_sentencepiece(tmp_path, **options)
    with pytest.raises(InputError, match=r"this sentencepiece model differs from Llama's.*Use the tokenizer.model of"):
        read_tokenizer(path, llama_version="2", key=KEY)


def test_missing_package(llama2_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="pip install sentencepiece"):
        read_tokenizer(llama2_model, llama_version="2", key=KEY)


def test_damaged_file(llama2_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(llama2_model.read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"{path}: this is not a sentencepiece model"):
        read_tokenizer(path, llama_version="2", key=KEY)
