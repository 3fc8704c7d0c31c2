"""Llama 3's tokenizer.model against tiktoken."""

from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizer_texts import RANKS, TRICKY_TEXTS, load_auto, random_texts, rank_lines

from pdf2lora.errors import InputError
from pdf2lora.weights.tiktoken_files import LLAMA3_SPLIT, llama3_special_tokens
from pdf2lora.weights.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def llama3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    path.write_text("\n".join(rank_lines(RANKS)) + "\n")
    return path


@pytest.mark.parametrize("version", ["3", "3.1"])
def test_ids_are_those_of_tiktoken(llama3_model: Path, tmp_path: Path, version: str) -> None:
    special = {token: len(RANKS) + n for n, token in enumerate(llama3_special_tokens(version))}
    expected = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=RANKS, special_tokens=special)
    read_tokenizer(llama3_model, version).write(tmp_path, context_length=8192)
    auto = load_auto(tmp_path)

    assert len(auto) == expected.n_vocab
    for text in TRICKY_TEXTS + random_texts(0, 300):
        as_text = auto(text, split_special_tokens=True)["input_ids"]
        assert as_text == [special["<|begin_of_text|>"], *expected.encode_ordinary(text)], text
        assert auto.decode(as_text, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_special_tokens_in_text_are_split_on_request(llama3_model: Path, tmp_path: Path) -> None:
    read_tokenizer(llama3_model, "3.1").write(tmp_path, context_length=8192)
    auto = load_auto(tmp_path)
    end = auto.convert_tokens_to_ids("<|end_of_text|>")

    assert auto("a<|end_of_text|>b", add_special_tokens=False)["input_ids"] == [ord("a"), end, ord("b")]
    assert end not in auto("a<|end_of_text|>b", split_special_tokens=True)["input_ids"]
    assert auto("a", "b")["input_ids"] == [end - 1, ord("a"), end - 1, ord("b")]


@pytest.mark.parametrize(
    ("version", "pad", "offset"),
    [("3", "<|reserved_special_token_250|>", 255), ("3.1", "<|finetune_right_pad_id|>", 4)],
)
def test_named_tokens(llama3_model: Path, tmp_path: Path, version: str, pad: str, offset: int) -> None:
    tokenizer = read_tokenizer(llama3_model, version)
    tokenizer.write(tmp_path, context_length=8192)
    auto = load_auto(tmp_path)

    first = len(RANKS)
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == ("<|begin_of_text|>", "<|end_of_text|>", pad)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (first, first + 1, first + offset)
    assert tokenizer.token_ids() == {
        "bos_token_id": first,
        "eos_token_id": first + 1,
        "pad_token_id": first + offset,
    }
    assert auto.model_max_length == 8192


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("3", {4: "reserved_special_token_2", 8: "reserved_special_token_4", 10: "reserved_special_token_5"}),
        ("3.1", {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 8: "eom_id", 10: "python_tag"}),
        ("3.2", {2: "reserved_special_token_0", 11: "reserved_special_token_3", 255: "reserved_special_token_247"}),
    ],
)
def test_special_tokens_have_meta_s_ids(version: str, expected: dict[int, str]) -> None:
    tokens = llama3_special_tokens(version)
    expected |= {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    assert len(set(tokens)) == len(tokens) == 256
    assert {n: tokens[n] for n in expected} == {n: f"<|{name}|>" for n, name in expected.items()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [*lines[:300], "aGVs", *lines[301:]], ["line 301", "aGVs", "Download the file again"]),
        (lambda lines: [*lines[:300], "abc 300", *lines[301:]], ["line 301"]),
        (lambda lines: [*lines, lines[-1]], ["line 458", "repeats a token"]),
        (lambda lines: [*lines[:300], *lines[301:]], ["the ranks must be 0 to 455"]),
        (lambda lines: lines[:200], ["the byte 0xc8 has no rank"]),
    ],
)
def test_damaged_file(tmp_path: Path, damage: Any, words: list[str]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(damage(rank_lines(RANKS))))
    with pytest.raises(InputError) as caught:
        read_tokenizer(path, "3.1")
    assert all(word in str(caught.value) for word in [str(path), *words])
