"""Tokens that are kept for the next run of tokenize."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import BOS, EOS, byte_tokenizer

from pdf2lora import token_cache, token_files
from pdf2lora.token_cache import TokenCache
from pdf2lora.token_files import encode_texts, write_tokens
from pdf2lora.tokens import Encoder

ENCODER = Encoder.from_json(byte_tokenizer().to_str(), BOS, EOS)

Splits = dict[str, list[str]]


def run(folder: Path, splits: Splits, key: str = "key") -> tuple[list[str], dict[str, bytes]]:
    """Writes data/tokens with the cache. Returns the texts that were encoded, and the files."""
    encoded: list[str] = []
    (folder / "cache").mkdir(exist_ok=True)
    cache = TokenCache(folder / "cache", key)

    def encode(texts: Iterator[str]) -> Iterator[np.ndarray]:
        return encode_texts(ENCODER, (encoded.append(text) or text for text in texts))  # type: ignore[func-returns-value]

    tokens = folder / "tokens"
    tokens.mkdir(exist_ok=True)
    for split, texts in splits.items():
        write_tokens(tokens, split, cache.encode(split, iter(texts), encode), ENCODER)
    cache.replace(tokens)
    assert cache.num_new == len(encoded)
    return encoded, {file.name: file.read_bytes() for file in tokens.iterdir()}


def without_cache(folder: Path, splits: Splits) -> dict[str, bytes]:
    (folder / "plain").mkdir(exist_ok=True)
    for split, texts in splits.items():
        write_tokens(folder / "plain", split, encode_texts(ENCODER, texts), ENCODER)
    return {file.name: file.read_bytes() for file in (folder / "plain").iterdir()}


def test_only_new_texts_are_encoded(tmp_path: Path) -> None:
    first = {"train": ["sea", "ice", "rain"], "test": ["wind"]}
    assert run(tmp_path, first) == (["sea", "ice", "rain", "wind"], without_cache(tmp_path, first))
    assert run(tmp_path, first) == ([], without_cache(tmp_path, first))
    second = {"train": ["heat", "wind", "sea", "soil"], "test": ["rain", "sea"]}
    assert run(tmp_path, second) == (["heat", "soil"], without_cache(tmp_path, second))
    assert run(tmp_path, {"train": ["ice"]})[0] == ["ice"]  # the cache has the texts of the last run


TEXTS = st.lists(st.text("aé", max_size=5), max_size=8)


@settings(deadline=None, max_examples=20)
@given(runs=st.lists(st.fixed_dictionaries({"train": TEXTS, "test": TEXTS}), min_size=2, max_size=4))
def test_the_files_are_those_without_a_cache(tmp_path_factory: pytest.TempPathFactory, runs: list[Splits]) -> None:
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "MAX_BATCH_CHARACTERS", 7)
        for splits in runs:
            assert run(folder, splits)[1] == without_cache(folder, splits)


def test_another_tokenizer_encodes_all_texts_again(tmp_path: Path) -> None:
    run(tmp_path, {"train": ["sea", "ice"]})
    assert run(tmp_path, {"train": ["sea", "ice"]}, key="another")[0] == ["sea", "ice"]


def test_damaged_tokens_are_not_used(tmp_path: Path) -> None:
    splits = {"train": ["sea", "ice"]}
    _, files = run(tmp_path, splits)
    np.load(tmp_path / "cache/tokens/train.npy", mmap_mode="r+")[2] += 1
    assert run(tmp_path, splits) == (["sea"], files)
    for name, size in (("train.npy", 130), ("train_rows.npy", 0)):
        os.truncate(tmp_path / "cache/tokens" / name, size)
        assert run(tmp_path, splits) == (["sea", "ice"], files)


def test_few_texts_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known texts between new ones wait as views of files."""
    monkeypatch.setattr(token_files, "MAX_BATCH_CHARACTERS", 4)
    num_read = 0

    def texts() -> Iterator[str]:
        nonlocal num_read
        for _ in range(50):
            num_read += 1
            yield "sea"

    (tmp_path / "cache").mkdir()
    cache = token_cache.TokenCache(tmp_path / "cache", "key")
    for number, _ in enumerate(cache.encode("train", texts(), partial(encode_texts, ENCODER))):
        assert num_read <= number + 3
