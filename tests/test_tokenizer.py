"""The kind of a tokenizer.model and the Llama version."""

from pathlib import Path

import pytest
from tokenizer_texts import KEY, RANKS, rank_lines, train_sentencepiece

from pdf2lora.errors import InputError
from pdf2lora.weights.tokenizer import read_tokenizer


@pytest.fixture
def llama3_model(tmp_path: Path) -> Path:
    path = tmp_path / "llama3.model"
    path.write_text("\n".join(rank_lines(RANKS)))
    return path


@pytest.fixture
def llama2_model(tmp_path: Path) -> Path:
    return train_sentencepiece(tmp_path)


def test_kind_must_fit_the_version(llama3_model: Path, llama2_model: Path) -> None:
    with pytest.raises(InputError, match=rf'this is a tiktoken file.*{KEY} is "2". Correct {KEY}'):
        read_tokenizer(llama3_model, llama_version="2", key=KEY)
    with pytest.raises(InputError, match=rf'this is not a tiktoken file.*{KEY} "3.1" uses. Correct {KEY}'):
        read_tokenizer(llama2_model, llama_version="3.1", key=KEY)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.model: the file is missing"):
        read_tokenizer(tmp_path / "tokenizer.model", llama_version="3", key=KEY)
