"""Measures of a text's quality. They need no word list and no language."""

import re
import unicodedata
from collections import Counter
from itertools import groupby

from pdf2lora.documents.characters import SYMBOL_BULLET
from pdf2lora.documents.text import UNSPACED

MAX_UNREADABLE_RUNS = 0.03  # runs of unreadable characters per character
MAX_SPACED_OUT_LETTERS = 0.15  # share of all words
MAX_GLUED_LETTERS = 0.2  # share of all letters in words of 26 letters or more
MIN_VOWELS = 0.2  # share of all Latin letters and of those in words, if the words have more than 150 letters
MIN_WORD = 4  # letters of these words: units and abbreviations (GWh, kV) often have no vowel
MIN_LATIN = 0.5  # share of all letters: a text in another script has units and abbreviations in Latin letters
MAX_COMPARED_CHARACTERS = 100_000  # of a text; the time of num_word_errors can grow with the square

_WORD = re.compile(r"[^\W\d_]+")
_LATIN_LETTERS = re.compile("[a-z]+")
_LATIN_WORD = re.compile(rf"[a-z]{{{MIN_WORD},}}")
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_UNSPACED_LETTER = re.compile(f"[{UNSPACED}]")
_UNREADABLE = re.compile("[\x00\x01\x03-\x08\x10-\x1f\ue000-\uf8ff\ufffd]+")
_SYMBOL = re.compile(r"(?<!\S)[\ue000-\uf8ff](?!\S)(?! [\ue000-\uf8ff])")  # a tick in a table
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")


def is_readable(text: str) -> bool:
    """Returns False for the codes of a font without a Unicode map, for spaced-out letters and for glued words.

    A font without widths spaces out whole words (t h e  r i v e r). Variables of a formula stand between words.
    """
    words = _WORD.findall(text)
    if not words or has_codes(text):
        return False
    spaced_out = _num_spaced_out_letters(text) / len(words)
    glued = sum(len(word) for word in re.findall(r"[A-Za-zÀ-ɏͰ-ӿ]{26,}", text)) / sum(map(len, words))
    return spaced_out < MAX_SPACED_OUT_LETTERS and glued < MAX_GLUED_LETTERS


def has_codes(text: str) -> bool:
    """Returns True if a text or page consists of codes: its font has no Unicode map, so only its image is readable.

    Bullets and single signs of symbol fonts are not codes.
    """
    if _UNREADABLE.search(text):
        runs = _UNREADABLE.findall(_SYMBOL.sub("", SYMBOL_BULLET.sub("", text)))
        if len(runs) >= MAX_UNREADABLE_RUNS * len(text):
            return True
    plain = unicodedata.normalize("NFD", text).lower()
    letters, words = "".join(_LATIN_LETTERS.findall(plain)), "".join(_LATIN_WORD.findall(plain))
    is_latin = len(letters) > MIN_LATIN * sum(map(str.isalpha, plain))
    return is_latin and len(words) > 150 and _has_few_vowels(letters) and _has_few_vowels(words)


def _has_few_vowels(letters: str) -> bool:
    return sum(map(letters.count, "aeiouy")) <= MIN_VOWELS * len(letters)


def _num_spaced_out_letters(text: str) -> int:
    """Returns the number of letters in runs of three or more single letters."""
    is_single = (len(token) == 1 and token.isalpha() and not _UNSPACED_LETTER.match(token) for token in text.split())
    runs = (sum(run) for single, run in groupby(is_single) if single)
    return sum(length for length in runs if length >= 3)


def num_word_errors(one: str, other: str) -> tuple[int, int]:
    """Compares the texts of two engines for the same pages. Returns the number of wrong words in each text.

    A word is wrong if the other text has its letters in the same order, but not as a word: it is split (ENG LISH) or
    glued to the next word. A correct word usually occurs more than once, in both texts. Single letters that the other
    text does not have also count, and runs of unreadable characters.
    """
    one, other = one[:MAX_COMPARED_CHARACTERS], other[:MAX_COMPARED_CHARACTERS]
    words, other_words = _TOKEN.findall(one.casefold()), _TOKEN.findall(other.casefold())
    counts, other_counts = Counter(words), Counter(other_words)
    return (
        len(_UNREADABLE.findall(one)) + _num_wrong(counts, other_counts, "".join(other_words)),
        len(_UNREADABLE.findall(other)) + _num_wrong(other_counts, counts, "".join(words)),
    )


def _num_wrong(counts: Counter[str], other_counts: Counter[str], other_letters: str) -> int:
    num_wrong = 0
    for word, count in counts.items():
        if len(word) > 1:
            num_wrong += count if word not in other_counts and word in other_letters else 0
        elif word.isalpha() and not _UNSPACED_LETTER.match(word):
            num_wrong += max(0, count - other_counts[word])
    return num_wrong


def is_right_to_left(text: str) -> bool:
    """Returns True if at least 10% of the characters are Hebrew, Arabic or of a similar script."""
    return len(_RIGHT_TO_LEFT.findall(text)) > 0.1 * len(text)
