"""How much of the test text also occurs in the training text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pdf2lora.documents.text import words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAKAGE_WORDS = 13  # n-gram of the leakage report (Brown et al. 2020, Language Models are Few-Shot Learners, app. C)


def leakage(train: Iterable[str], test: Iterable[str]) -> float | None:
    """Share of the test texts' 13-grams of words that also occur in the train texts; None where test has no 13-gram."""
    import numpy as np  # late, as datasketch above

    vocabulary: dict[str, int] = {}
    seen = np.unique(np.concatenate([_ngrams(text, vocabulary) for text in train]))
    tested = np.concatenate([_ngrams(text, vocabulary) for text in test])
    return float(np.isin(tested, seen).mean()) if len(tested) else None


def _ngrams(text: str, vocabulary: dict[str, int]) -> "NDArray[np.uint64]":
    """A 64-bit number for each 13-gram: a polynomial of the word numbers, modulo 2**64."""
    import numpy as np

    numbers = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)], dtype=np.uint64)
    if len(numbers) < LEAKAGE_WORDS:
        return np.empty(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(LEAKAGE_WORDS, 0x9E3779B97F4A7C15, dtype=np.uint64))
        return np.asarray(np.lib.stride_tricks.sliding_window_view(numbers, LEAKAGE_WORDS) @ powers, dtype=np.uint64)
