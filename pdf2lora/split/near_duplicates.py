"""Groups of near-duplicate texts (MinHash with locality-sensitive hashing, Broder 1997)."""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pdf2lora.split.word_hashes import Hashes, mix, ngram_hashes

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
MAX_MISSED = 0.01  # largest probability that a pair with the given similarity is not compared

Sketch = NDArray[np.uint32]  # (NUM_PERMUTATIONS,)


def sketch(words: Hashes) -> Sketch:
    """The MinHash of a text's 5-word shingles.

    The share of equal entries of two sketches estimates the Jaccard similarity of the texts.

    words: see word_hashes. A text with fewer than 5 words is one shingle.
    """
    shingles = ngram_hashes(words, min(SHINGLE_WORDS, len(words)))
    smallest = np.empty(NUM_PERMUTATIONS, dtype=np.uint64)
    permuted = np.empty_like(shingles)
    for number, factor in enumerate(_factors()):
        np.multiply(shingles, factor, out=permuted)
        smallest[number] = permuted.min()
    return (smallest >> np.uint64(32)).astype(np.uint32)


def near_duplicate_groups(sketches: NDArray[np.uint32], similarity: float) -> list[list[int]]:
    """Groups texts by their sketches. Returns the numbers of the texts in each group.

    sketches: (num_texts, NUM_PERMUTATIONS).
    similarity: the smallest Jaccard similarity of near-duplicates.

    Only texts with an equal band of entries are compared. So the time is nearly linear in the number of texts. But if
    most of them are just below the limit (forms with one template), it is quadratic. The groups do not depend on the
    order of the texts. If a is similar to b and b to c, then all three are one group.
    """
    group_of = np.arange(len(sketches))
    width = band_width(similarity)
    for first in range(0, NUM_PERMUTATIONS - width + 1, width):
        for numbers in _equal_rows(sketches[:, first : first + width]):
            _join_similar(numbers, sketches, similarity, group_of)
    groups: dict[int, list[int]] = {}
    for number, group in enumerate(group_of.tolist()):
        groups.setdefault(group, []).append(number)
    return list(groups.values())


def band_width(similarity: float) -> int:
    """The widest band that misses a pair with this similarity with a probability of at most MAX_MISSED.

    A band of two sketches is equal with probability similarity ** width. Wide bands cause few needless comparisons.
    """
    widths = range(NUM_PERMUTATIONS, 1, -1)
    return next((w for w in widths if (1 - similarity**w) ** (NUM_PERMUTATIONS // w) <= MAX_MISSED), 1)


def _equal_rows(rows: NDArray[np.uint32]) -> Iterator[NDArray[np.intp]]:
    """Yields the numbers of the rows that are equal, for each row that occurs more than once."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        keys = mix(keys + column)
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    ends = np.append(begins[1:], len(keys))
    for begin, end in zip(begins[ends - begins > 1], ends[ends - begins > 1], strict=True):
        yield order[begin:end]


def _join_similar(
    numbers: NDArray[np.intp], sketches: NDArray[np.uint32], similarity: float, group_of: NDArray[np.intp]
) -> None:
    """Joins the groups of all pairs of these texts that are similar. A group is named after its first text."""
    for position, number in enumerate(numbers):
        others = numbers[position + 1 :]
        others = others[group_of[others] != group_of[number]]
        if not len(others):  # all later texts are in this group
            return
        similar = others[(sketches[others] == sketches[number]).mean(axis=1) >= similarity]
        if len(similar):
            joined = np.unique(group_of[[number, *similar]])
            group_of[np.isin(group_of, joined)] = joined[0]


@cache
def _factors() -> Hashes:
    """Odd factors: multiplication by one of them, modulo 2**64, permutes the hashes."""
    numbers = np.random.default_rng(1).integers(2**63, size=NUM_PERMUTATIONS, dtype=np.uint64)
    return numbers * np.uint64(2) + np.uint64(1)
