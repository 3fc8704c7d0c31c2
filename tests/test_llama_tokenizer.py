import base64
import json
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken

from pdf2lora.errors import InputError
from pdf2lora.weights.tokenizer import LLAMA3_SPLIT, last_merge, llama3_special_tokens, read_tokenizer

KEY = "models.tiny.llama_version"
TRAINING_TEXT = """It is raining on the hills, and the river doesn't rest: it'll rise by 1250 mm before the year 2040.
The sea is warmer than it was; the ice is thinner than it has been. They've measured it, we're told, since 1979.
Der Fluß läuft über; l'été a été très chaud; 海の温度が上がっている。
Where there is heat there is rain, and then again heat.
    for year in range(1979, 2041):
        print(year,  heat[year])
"""
TRICKY_TEXTS = [
    "",
    " ",
    "Hello, world",
    "the river, the rain, the heat",
    "don't DON'T it'll they've we're I'd 's 't",
    "1 12 123 1234 12345678 3.14 1,000,000",
    " one  two   three    four",
    "trailing  \n\n  leading\n\tTab \t \r\n end  ",
    "\n\n\n",
    "    indented(code[0])  # comment...!!!",
    "äöü ß naïve e\u0301 \u00a0 ﬁn \u2028 Ελλάδα Привет हिन्दी 한국어 海の温度",
    "🙂👩\u200d👩\u200d👧🏳️\u200d🌈 ☃",
    "▁▁ under▁score",
    "<|begin_of_text|> <s> </s> <unk> <0x0A> <|eot_id|>",
    "aaaaaaaaaaaaaaaa eeeeeee thththth",
    "a zyxw zyxwv zyxw.",
    "\x00\x01\x7f",
]


def train_ranks(text: str, num_merges: int) -> dict[bytes, int]:
    """Byte-level BPE: joins the most frequent neighbours, `num_merges` times."""
    words = Counter(re.findall(r" ?\S+|\s+", text))
    spelled = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for parts in spelled.values():
            for n in range(len(parts) - 1, 0, -1):
                if parts[n - 1 : n + 1] == [left, right]:
                    parts[n - 1 : n + 1] = [left + right]
    return ranks


def rank_lines(ranks: dict[bytes, int]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]


RANKS = train_ranks(TRAINING_TEXT, 200)
RANKS[b" zyxw"] = len(RANKS)  # no merges lead there; Llama 3 has 588 such tokens, found as whole words alone


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """A BPE model as Llama 2 has it, unless options say otherwise."""
    text = folder / "text.txt"
    text.write_text(TRAINING_TEXT * 3, encoding="utf-8")
    llama: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 430,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(folder / "tokenizer"), minloglevel=2, num_threads=1, **(llama | options)
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    path.write_text("\n".join(rank_lines(RANKS)) + "\n")
    return path


@pytest.fixture(scope="module")
def llama2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("llama2"))


def load_auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder)


def random_texts(seed: int, number: int) -> list[str]:
    """Words and fragments of the training text in new neighbourhoods, so that merges meet in ways not seen before."""
    draw = random.Random(seed)
    pieces = re.findall(r"\w+|\s+|.", TRAINING_TEXT) + list("abehinrst 019\n")
    return ["".join(draw.choices(pieces, k=30)) for _ in range(number)]


class TestLlama3:
    @pytest.mark.parametrize("version", ["3", "3.1"])
    def test_ids_are_those_of_tiktoken(self, llama3_model: Path, tmp_path: Path, version: str) -> None:
        special = {token: len(RANKS) + n for n, token in enumerate(llama3_special_tokens(version))}
        expected = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=RANKS, special_tokens=special)
        read_tokenizer(llama3_model, llama_version=version, key=KEY).write(tmp_path, context_length=8192)
        auto = load_auto(tmp_path)

        assert len(auto) == expected.n_vocab
        for text in TRICKY_TEXTS + random_texts(0, 300):
            as_text = auto(text, split_special_tokens=True)["input_ids"]
            assert as_text == [special["<|begin_of_text|>"], *expected.encode_ordinary(text)], text
            assert auto.decode(as_text, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text

    def test_special_tokens_in_text_are_read_unless_asked_not_to(self, llama3_model: Path, tmp_path: Path) -> None:
        read_tokenizer(llama3_model, llama_version="3.1", key=KEY).write(tmp_path, context_length=8192)
        auto = load_auto(tmp_path)
        end = auto.convert_tokens_to_ids("<|end_of_text|>")

        assert auto("a<|end_of_text|>b", add_special_tokens=False)["input_ids"] == [ord("a"), end, ord("b")]
        assert end not in auto("a<|end_of_text|>b", split_special_tokens=True)["input_ids"]
        assert auto("a", "b")["input_ids"] == [end - 1, ord("a"), end - 1, ord("b")]

    @pytest.mark.parametrize(
        ("version", "pad", "offset"),
        [("3", "<|reserved_special_token_250|>", 255), ("3.1", "<|finetune_right_pad_id|>", 4)],
    )
    def test_named_tokens(self, llama3_model: Path, tmp_path: Path, version: str, pad: str, offset: int) -> None:
        tokenizer = read_tokenizer(llama3_model, llama_version=version, key=KEY)
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
    def test_special_tokens_stand_where_meta_put_them(self, version: str, expected: dict[int, str]) -> None:
        tokens = llama3_special_tokens(version)
        expected |= {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
        assert len(set(tokens)) == len(tokens) == 256
        assert {n: tokens[n] for n in expected} == {n: f"<|{name}|>" for n, name in expected.items()}

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda lines: [*lines[:300], "aGVs", *lines[301:]], ["line 301", "aGVs", "fetch the file again"]),
            (lambda lines: [*lines[:300], "abc 300", *lines[301:]], ["line 301"]),
            (lambda lines: [*lines, lines[-1]], ["line 458", "repeats a token"]),
            (lambda lines: [*lines[:300], *lines[301:]], ["ranks must be 0 to 455"]),
            (lambda lines: lines[:200], ["byte 0xc8 has no rank"]),
        ],
    )
    def test_damaged_file(self, tmp_path: Path, damage: Any, words: list[str]) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_text("\n".join(damage(rank_lines(RANKS))))
        with pytest.raises(InputError) as caught:
            read_tokenizer(path, llama_version="3.1", key=KEY)
        assert all(word in str(caught.value) for word in [str(path), *words])


class TestLlama2:
    def test_ids_are_those_of_sentencepiece(self, llama2_model: Path, tmp_path: Path) -> None:
        expected = sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))
        read_tokenizer(llama2_model, llama_version="2", key=KEY).write(tmp_path, context_length=4096)
        auto = load_auto(tmp_path)

        assert len(auto) == expected.GetPieceSize()
        for text in TRICKY_TEXTS + random_texts(1, 300):
            assert auto(text, split_special_tokens=True)["input_ids"] == [1, *expected.EncodeAsIds(text)], text
        text = " two  spaces\n\ttab 🙂 海 é"
        assert auto.decode(auto(text)["input_ids"], skip_special_tokens=True) == text

    def test_named_tokens(self, llama2_model: Path, tmp_path: Path) -> None:
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
    def test_other_kinds_of_model_are_refused(self, tmp_path: Path, options: dict[str, Any]) -> None:
        path = train_sentencepiece(tmp_path, **options)
        with pytest.raises(
            InputError, match=r"sentencepiece model unlike Llama's.*use the tokenizer.model that came with"
        ):
            read_tokenizer(path, llama_version="2", key=KEY)

    def test_missing_package(self, llama2_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(InputError, match="pip install sentencepiece"):
            read_tokenizer(llama2_model, llama_version="2", key=KEY)

    def test_damaged_file(self, llama2_model: Path, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(llama2_model.read_bytes()[:1000])
        with pytest.raises(InputError, match=rf"{path}: not a sentencepiece model"):
            read_tokenizer(path, llama_version="2", key=KEY)


def test_kind_must_fit_the_version(llama3_model: Path, llama2_model: Path) -> None:
    with pytest.raises(InputError, match=rf'a tiktoken file.*{KEY} is "2"; correct {KEY}'):
        read_tokenizer(llama3_model, llama_version="2", key=KEY)
    with pytest.raises(InputError, match=rf'not a tiktoken file.*{KEY} "3.1" has; correct {KEY}'):
        read_tokenizer(llama2_model, llama_version="3.1", key=KEY)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.model: no such file"):
        read_tokenizer(tmp_path / "tokenizer.model", llama_version="3", key=KEY)


@pytest.mark.parametrize(
    ("token", "ranks", "expected"),
    [
        ("ab", {"ab": 0}, ("a", "b")),
        ("abc", {"bc": 0, "ab": 1, "abc": 2}, ("a", "bc")),
        ("abc", {"ab": 0, "bc": 1, "abc": 2}, ("ab", "c")),
        ("aaaa", {"aa": 0, "aaa": 1, "aaaa": 2}, ("aa", "aa")),
        ("abc", {"abc": 0, "bc": 1}, ("a", "bc")),  # by way of a token of higher rank, as tiktoken does
        ("abcd", {"bc": 0, "abcd": 1}, None),
        ("a", {}, None),
    ],
)
def test_last_merge(token: str, ranks: dict[str, float], expected: tuple[str, str] | None) -> None:
    assert last_merge(token, ranks) == expected
    as_bytes = last_merge(token.encode(), {other.encode(): rank for other, rank in ranks.items()})
    assert as_bytes == (expected and tuple(part.encode() for part in expected))
