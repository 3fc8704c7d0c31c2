"""The kind of a tokenizer.model and the Llama version."""

import shutil
from pathlib import Path

import pytest
from tokenizer_texts import KEY, RANKS, rank_lines, train_sentencepiece

from pdf2lora.errors import InputError
from pdf2lora.weights.tokenizer import read_tokenizer


@pytest.fixture
def llama3_model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny/tokenizer.model"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(rank_lines(RANKS)))
    return path


@pytest.fixture
def llama2_model(tmp_path: Path, llama3_model: Path) -> Path:
    return Path(shutil.copy(train_sentencepiece(tmp_path), tmp_path / "tiny/llama2.model"))


def test_kind_must_fit_the_version(llama3_model: Path, llama2_model: Path) -> None:
    with pytest.raises(InputError, match=rf'this is a tiktoken file.*{KEY} is "2". Correct {KEY}'):
        read_tokenizer(llama3_model, "2")
    with pytest.raises(InputError, match=rf'this is not a tiktoken file.*{KEY} "3.1" uses. Correct {KEY}'):
        read_tokenizer(llama2_model, "3.1")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.model: the file is missing"):
        read_tokenizer(tmp_path / "tokenizer.model", "3")
