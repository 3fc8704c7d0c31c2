"""The words of a text as 64-bit hashes, for the comparison of texts.

The hashes are computed with numpy: a Python object for each word would take most of the time of split.
"""

import re
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pdf2lora.documents.text import UNSPACED

Hashes = NDArray[np.uint64]

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio
_MAX_POSITIONS = 256  # in a word; each one has its own weight
_MAX_MARK = 0x20000
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)  # they follow emoji
_OTHER, _LETTER, _WHOLE_WORD = range(3)


def word_hashes(text: str) -> Hashes:
    """Returns a hash of each word in lower case, without punctuation. In scripts without spaces, a character is a word.

    Combining marks belong to their word, for example the vowel signs of Hindi, Arabic and Hebrew.

    The same word has the same hash on every machine.
    """
    characters = np.frombuffer(text.lower().encode("utf-32-le"), dtype="<u4")
    kinds = _kinds()[characters]
    follows_letter = np.append(False, kinds[:-1] == _LETTER)
    starts = np.flatnonzero((kinds == _WHOLE_WORD) | ((kinds == _LETTER) & ~follows_letter))
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    characters, kinds, starts = characters[starts[0] :], kinds[starts[0] :], starts - starts[0]
    positions = np.arange(len(characters)) - np.repeat(starts, np.diff(starts, append=len(characters)))
    terms = (characters + np.uint64(1)) * _weights()[np.minimum(positions, _MAX_POSITIONS - 1)] * (kinds != _OTHER)
    return mix(np.add.reduceat(terms, starts))


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """Returns a hash of each n-gram of `length` words; empty if there are fewer words."""
    num_ngrams = max(0, len(words) - length + 1)
    hashes = np.zeros(num_ngrams, dtype=np.uint64)
    for first in range(length):
        hashes *= _ODD
        hashes += words[first : first + num_ngrams]
    return mix(hashes)


def mix(hashes: Hashes) -> Hashes:
    """Makes each bit depend on all bits (the finalizer of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


@cache
def _weights() -> Hashes:
    return np.cumprod(np.full(_MAX_POSITIONS, _ODD), dtype=np.uint64)


@cache
def _kinds() -> NDArray[np.uint8]:
    """The kind of each character of Unicode."""
    characters = "".join(map(chr, range(0x110000)))
    kinds = np.full(len(characters), _OTHER, dtype=np.uint8)
    marks = (code for code, character in enumerate(characters[:_MAX_MARK]) if unicodedata.category(character)[0] == "M")
    kinds[[code for code in marks if code not in _VARIATION_SELECTORS]] = _LETTER
    for kind, pattern in ((_WHOLE_WORD, rf"[{UNSPACED}]+"), (_LETTER, rf"[^\W{UNSPACED}]+")):
        for run in re.finditer(pattern, characters):
            kinds[run.start() : run.end()] = kind
    return kinds
