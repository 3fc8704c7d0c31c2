"""Leakage: the share of the test text that is also in the training text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pdf2lora.documents.text import words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NGRAM_WORDS = 13  # as in Brown et al. 2020, Language Models are Few-Shot Learners, appendix C


def leakage(train: Iterable[str], test: Iterable[str]) -> float | None:
    """Returns the share of the word 13-grams of `test` that are also in `train`; None if `test` has no 13-gram."""
    import numpy as np  # here, because the stage extract does not need it

    vocabulary: dict[str, int] = {}
    train_ngrams = np.unique(np.concatenate([_ngrams(text, vocabulary) for text in train]))
    test_ngrams = np.concatenate([_ngrams(text, vocabulary) for text in test])
    return float(np.isin(test_ngrams, train_ngrams).mean()) if len(test_ngrams) else None


def _ngrams(text: str, vocabulary: dict[str, int]) -> "NDArray[np.uint64]":
    """Returns one 64-bit number per 13-gram: a polynomial of the word numbers, modulo 2**64."""
    import numpy as np

    numbers = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)], dtype=np.uint64)
    if len(numbers) < NGRAM_WORDS:
        return np.empty(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(NGRAM_WORDS, 0x9E3779B97F4A7C15, dtype=np.uint64))
        return np.asarray(np.lib.stride_tricks.sliding_window_view(numbers, NGRAM_WORDS) @ powers, dtype=np.uint64)
