"""Leakage: the share of the test text that is also in the training text."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from pdf2lora.runtime.parallel import Workers, batches
from pdf2lora.split.word_hashes import Hashes, ngram_hashes, word_hashes

NGRAM_WORDS = 13  # as in Brown et al. 2020, Language Models are Few-Shot Learners, appendix C
MAX_TEST_NGRAMS = 2**24  # in memory, 8 bytes each


def leakage(train: Iterable[str], test: Iterable[str], folder: Path, workers: Workers) -> float | None:
    """Returns the share of the word 13-grams of `test` that are also in `train`; None if `test` has no 13-gram.

    The share is exact up to MAX_TEST_NGRAMS (about 2,000 test documents of 48,000 characters). If there are more, only
    the 13-grams with a small hash are compared, which is a random part.

    folder: for a temporary file that the workers read. Several runs can use it at the same time.
    """
    ngrams, max_hash = _collect(test, workers)
    if not len(ngrams):
        return None
    ngrams.sort()
    is_in_train = np.zeros(len(ngrams), dtype=bool)
    with TemporaryDirectory(dir=folder) as own_folder:
        file = Path(own_folder) / "test_ngrams.npy"
        np.save(file, ngrams)
        for places in workers.map(partial(_places_in, file, max_hash), batches(train)):
            is_in_train[places] = True
    firsts = np.flatnonzero(is_in_train)
    num_common = (np.searchsorted(ngrams, ngrams[firsts], side="right") - firsts).sum()
    return float(num_common / len(ngrams))


def _collect(test: Iterable[str], workers: Workers) -> tuple[Hashes, np.uint64]:
    """Returns the hashes of the 13-grams of `test` that are at most max_hash, and max_hash.

    max_hash is halved until at most MAX_TEST_NGRAMS remain.
    """
    max_hash = np.uint64(2**64 - 1)
    parts = [np.empty(0, dtype=np.uint64)]
    num_kept = 0
    for hashes in workers.map(_ngrams, batches(test)):
        parts.append(hashes[hashes <= max_hash])
        num_kept += len(parts[-1])
        while num_kept > MAX_TEST_NGRAMS:
            max_hash >>= np.uint64(1)
            parts = [part[part <= max_hash] for part in parts]
            num_kept = sum(map(len, parts))
    return np.concatenate(parts), max_hash


def _ngrams(texts: Sequence[str]) -> Hashes:
    return np.concatenate([ngram_hashes(word_hashes(text), NGRAM_WORDS) for text in texts])


def _places_in(file: Path, max_hash: np.uint64, texts: Sequence[str]) -> NDArray[np.intp]:
    """Returns the places of the texts' 13-grams in the sorted hashes of a file: the first place of equal hashes."""
    ngrams = np.load(file, mmap_mode="r")
    hashes = _ngrams(texts)
    hashes = np.sort(hashes[hashes <= max_hash])  # searchsorted finds sorted hashes faster
    places = np.minimum(np.searchsorted(ngrams, hashes), len(ngrams) - 1)
    return np.asarray(places[ngrams[places] == hashes])
