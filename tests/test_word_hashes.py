import re
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdf2lora.documents.text import UNSPACED
from pdf2lora.split.word_hashes import ngram_hashes, word_hashes

MARKS = "".join(
    character for character in map(chr, range(0x20000)) if unicodedata.category(character)[0] == "M"
).translate(dict.fromkeys(range(0xFE00, 0xFE10)))


def same_words(text: str, words: list[str]) -> bool:
    """Whether a text has these words, of which each has its own hash."""
    hashes = word_hashes(text).tolist()
    expected = [word_hashes(word).tolist() for word in words]
    return [[value] for value in hashes] == expected and len({*hashes}) == len({*words})


def test_words_are_in_lower_case_without_punctuation() -> None:
    words = ["the", "sea", "level", "rise", "2", "5", "cm", "ärger", "ab", "ba", "a", "b"]
    assert same_words("The SEA, level-rise (2.5 cm): Ärger! ab ba a/b", words)


def test_characters_are_words_where_words_are_not_separated() -> None:
    assert same_words("数据和HBV模型，2019年", ["数", "据", "和", "hbv", "模", "型", "2019", "年"])
    assert same_words("カタカナ ひらがな", list("カタカナひらがな"))
    assert same_words("한국어 텍스트", ["한국어", "텍스트"])


def test_vowel_signs_belong_to_their_word() -> None:
    assert same_words("हिन्दी भाषा", ["हिन्दी", "भाषा"])
    assert same_words("كِتَابٌ، שָׁלוֹם", ["كِتَابٌ", "שָׁלוֹם"])
    assert same_words("sun ☀\ufe0f sea", ["sun", "sea"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("aBé_09 .-\n数が한ﬁ\u0301İ"), max_size=30) | st.text(max_size=30))
@example("")
@example("...")
def test_words_are_those_of_a_regular_expression(text: str) -> None:
    letters = rf"[{UNSPACED}]|(?:[^\W{UNSPACED}]|(?![{UNSPACED}])[{MARKS}])+"
    words = re.findall(letters, text.lower())
    assert word_hashes(text).tolist() == [int(word_hashes(word)[0]) for word in words]


def test_long_words_are_hashed() -> None:
    assert len({int(word_hashes("x" * length)[0]) for length in range(1, 1000)}) == 999


def test_hashes_are_the_same_on_every_machine() -> None:
    assert word_hashes("sea").tolist() == [8529517713617321668]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_equal_ngrams_have_equal_hashes(length: int) -> None:
    words = word_hashes("a b c a b c a c b")
    hashes = ngram_hashes(words, length).tolist()
    ngrams = [tuple(words[first : first + length].tolist()) for first in range(len(words) - length + 1)]
    assert len(hashes) == len(ngrams)
    assert len({*hashes}) == len({*ngrams}) == len({*zip(hashes, ngrams, strict=True)})


def test_too_few_words_have_no_ngram() -> None:
    assert ngram_hashes(word_hashes("a b"), 3).tolist() == []
    assert ngram_hashes(np.empty(0, dtype=np.uint64), 3).tolist() == []
