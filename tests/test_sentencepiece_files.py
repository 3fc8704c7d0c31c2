"""Llama 1's and 2's tokenizer.model against sentencepiece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizer_texts import TRICKY_TEXTS, load_auto, random_texts, train_sentencepiece

from pdf2lora.errors import InputError
from pdf2lora.weights.sentencepiece_files import convert_sentencepiece
from pdf2lora.weights.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def llama2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("llama2"))


def test_ids_are_those_of_sentencepiece(llama2_model: Path, tmp_path: Path) -> None:
    expected = sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))
    read_tokenizer(llama2_model, "2").write(tmp_path, context_length=4096)
    auto = load_auto(tmp_path)

    assert len(auto) == expected.GetPieceSize()
    for text in TRICKY_TEXTS + random_texts(1, 300):
        assert auto(text, split_special_tokens=True)["input_ids"] == [1, *expected.EncodeAsIds(text)], text
    text = " two  spaces\n\ttab 🙂 海 é"
    assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text


def test_named_tokens(llama2_model: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(llama2_model, "1")
    tokenizer.write(tmp_path, context_length=2048)
    auto = load_auto(tmp_path)

    assert (auto.unk_token, auto.bos_token, auto.eos_token, auto.pad_token) == ("<unk>", "<s>", "</s>", "<unk>")
    assert tokenizer.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert auto("<s>", add_special_tokens=False)["input_ids"] == [1]


OPTIONS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram", "vocab_size": 350, "remove_extra_whitespaces": True},
    "unigram, NFKC": {
        "model_type": "unigram",
        "vocab_size": 350,
        "remove_extra_whitespaces": True,
        "normalization_rule_name": "nmt_nfkc",
    },
    "NFKC": {"normalization_rule_name": "nmt_nfkc"},
    "NFKC and lower case": {"normalization_rule_name": "nfkc_cf"},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no space before the first word": {"add_dummy_prefix": False},
    "digits together": {"split_digits": False},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 170},
    "user-defined symbols": {"user_defined_symbols": ["river", "<|im_start|>", "\n\n", "\t"], "vocab_size": 440},
    "overlapping symbols": {"user_defined_symbols": ["ri", "rive", "iver"], "vocab_size": 440},
    "symbols with spaces": {"user_defined_symbols": ["the ", "  "], "add_dummy_prefix": False, "vocab_size": 440},
    "no BOS, padding": {"bos_id": -1, "pad_id": 3},
}
MORE_TEXTS = [
    "ｆｕｌｌ　ｗｉｄｔｈ ½ ² ① ㎏ ﷺ ｶﾞ ﾊﾟ",
    "riverive river\triver\n\n\n  the the  ",
    "a" + " " * 30 + "b",
    "\t\t\n \n",
    "中文，海の温度 한국어 🙂 ☃\ufe0f \U0001f3f4\u200d\u2620\ufe0f",
]


@pytest.mark.parametrize("name", OPTIONS)
def test_other_settings_give_the_ids_of_sentencepiece(tmp_path: Path, name: str) -> None:
    path = train_sentencepiece(tmp_path, **OPTIONS[name])
    expected = sentencepiece.SentencePieceProcessor(model_file=str(path))

    tokenizer = convert_sentencepiece(path.read_bytes(), path).tokenizer
    tokenizer.encode_special_tokens = True

    for text in TRICKY_TEXTS + MORE_TEXTS + random_texts(2, 300):
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected.EncodeAsIds(text), text


def test_decoding_gives_the_text(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path, user_defined_symbols=["river"], vocab_size=440)
    tokenizer = convert_sentencepiece(path.read_bytes(), path).tokenizer
    text = " two  spaces\n\ttab 🙂 海 river é"

    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word", "byte_fallback": False, "vocab_size": 60}, "its algorithm is WORD"),
        ({"model_type": "char", "vocab_size": 330}, "its algorithm is CHAR"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces after words"),
        # Several ways to split a run of spaces have the same score, and the two libraries choose different ones.
        ({"model_type": "unigram", "vocab_size": 350}, r"splits 'a +b' in another way than sentencepiece"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    path = train_sentencepiece(tmp_path, **options)

    with pytest.raises(InputError, match=rf"cannot be converted, because .*{reason}.* AutoTokenizer"):
        convert_sentencepiece(path.read_bytes(), path)


def cut(content: bytes) -> bytes:
    return content[:1000]


def with_a_piece_that_is_not_utf8(content: bytes) -> bytes:
    return content.replace("\u2581the".encode(), b"\xff" * 6)


@pytest.mark.parametrize("damage", [cut, with_a_piece_that_is_not_utf8])
def test_damaged_file(llama2_model: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(llama2_model.read_bytes()))
    with pytest.raises(InputError, match=rf"{path}: this is not a sentencepiece model"):
        read_tokenizer(path, "2")
