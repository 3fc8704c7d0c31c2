"""The Document record, its JSONL file, and the split of documents into train, validation and test."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR_DUPLICATE_WORDS = 5  # a shingle of MinHash
LEAKAGE_WORDS = 13  # n-gram of the leakage report (Brown et al. 2020, Language Models are Few-Shot Learners, app. C)
SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One PDF of the corpus, kept or left out."""

    id: str  # path within the corpus folder
    sha256: str  # of the PDF's bytes
    num_pages: int | None  # in the file; None where no engine could count them
    pages_read: int
    engine: str | None  # that gave the text
    attempts: dict[str, str]  # engine -> "complete" or what stopped it
    characters_raw: int  # before cleaning
    characters: int  # of text
    reason: str | None  # why it is left out; None = kept
    text: str


def write_documents(file: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line, UTF-8."""
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for document in documents:
            out.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def read_documents(file: Path) -> list[Document]:
    with file.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def near_duplicate_groups(texts: Sequence[str], similarity: float) -> list[list[int]]:
    """Groups of positions whose texts share 5-word shingles to a Jaccard similarity of `similarity` or more.

    MinHash with locality-sensitive hashing (Broder 1997; datasketch), its 128 permutations seeded: near-linear in the
    number of texts, and the same groups whatever their order. Similarity carries over: a ~ b and b ~ c put a, b, c in
    one group.
    """
    from datasketch import MinHash, MinHashLSH  # imports numpy and scipy: only split pays for it

    index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=128)  # finds candidates; jaccard decides
    sketches = []
    for number, text in enumerate(tqdm(texts, desc="split", unit="document", disable=None)):
        sketch = MinHash(num_perm=128, seed=1)
        tokens = words(text)
        shingles = {" ".join(tokens[i : i + NEAR_DUPLICATE_WORDS]) for i in range(max(1, len(tokens) - 4))}
        sketch.update_batch([shingle.encode() for shingle in shingles])
        index.insert(number, sketch)
        sketches.append(sketch)

    group_of = list(range(len(texts)))

    def root(number: int) -> int:
        while group_of[number] != number:
            number = group_of[number]
        return number

    for number, sketch in enumerate(sketches):
        for other in index.query(sketch):
            if sketch.jaccard(sketches[other]) >= similarity:
                low, high = sorted((root(number), root(other)))
                group_of[high] = low
    groups: dict[int, list[int]] = {}
    for number in range(len(texts)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def split(
    documents: Sequence[Document], *, test_fraction: float, validation_fraction: float, similarity: float, seed: int
) -> dict[str, list[Document]]:
    """Train, validation and test documents; a group of near-duplicates is wholly on one side.

    Each group draws a number from a seeded hash of its texts. In the order of these numbers the test side is filled
    first, then validation, each to its share of the documents (at least one), and train takes the rest. So neither
    the names nor the order of the files matter, and a document that is added moves one across each boundary at the
    most.

    Returns:
        side -> documents in the order of their draws.

    Raises:
        ValueError: there are fewer groups than sides to fill.
    """
    hashes = [text_sha256(document.text) for document in documents]
    groups = near_duplicate_groups([document.text for document in documents], similarity)
    sides = [side for side in SIDES if side != "validation" or validation_fraction > 0]
    if len(groups) < len(sides):
        raise ValueError(f"{len(groups)} groups of documents cannot fill {', '.join(sides)}")

    def draw(group: list[int]) -> str:
        return hashlib.sha256(f"{seed} {min(hashes[number] for number in group)}".encode()).hexdigest()

    waiting = sorted(groups, key=draw)
    filled: dict[str, list[Document]] = {side: [] for side in SIDES}
    test_wanted = max(1, round(test_fraction * len(documents)))
    up_to_validation = round((test_fraction + validation_fraction) * len(documents))
    validation_wanted = max(1, up_to_validation - test_wanted) if validation_fraction else 0
    for side, wanted in (("test", test_wanted), ("validation", validation_wanted)):
        while len(filled[side]) < wanted and len(waiting) > 1 + (side == "test" and validation_fraction > 0):
            filled[side] += [documents[number] for number in sorted(waiting.pop(0), key=hashes.__getitem__)]
    filled["train"] = [documents[number] for group in waiting for number in sorted(group, key=hashes.__getitem__)]
    return filled


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
