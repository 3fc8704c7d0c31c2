"""The sketches of texts. Those of an earlier run are read from a cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdf2lora.documents.text import text_sha256
from pdf2lora.runtime.files import atomic_write
from pdf2lora.runtime.parallel import batches
from pdf2lora.split.near_duplicates import NUM_PERMUTATIONS, sketch
from pdf2lora.split.word_hashes import word_hashes

# One row for each text: text_sha256, num_words, sketch (see near_duplicates).
ROW = np.dtype([("text_sha256", "S64"), ("num_words", np.int64), ("sketch", np.uint32, NUM_PERMUTATIONS)])
Rows = NDArray[np.void]
SketchBatches = Callable[[Callable[[list[str]], Rows], Iterable[list[str]]], Iterator[Rows]]


def sketch_texts(texts: Iterable[str], cache: Path, run: SketchBatches) -> tuple[Rows, int]:
    """Returns a row for each text, in the order of the texts, and the number of texts that were not in the cache.

    cache: a file that keeps the rows of these texts for the next run.
    run: Workers.map, or a function that does the same on other machines.
    """
    cached = np.load(cache) if cache.exists() else np.empty(0, dtype=ROW)
    number_of = {sha256: number for number, sha256 in enumerate(cached["text_sha256"].tolist())}
    numbers: list[int] = []

    def new_texts() -> Iterator[str]:
        for text in texts:
            sha256 = text_sha256(text).encode()
            is_new = sha256 not in number_of
            numbers.append(number_of.setdefault(sha256, len(number_of)))
            if is_new:
                yield text

    new = list(run(_sketch_batch, batches(new_texts())))
    rows = np.concatenate([cached, *new])[numbers]
    with atomic_write(cache) as partial, partial.open("wb") as out:
        np.save(out, rows)
    return rows, sum(map(len, new))


def _sketch_batch(texts: Sequence[str]) -> Rows:
    rows = np.empty(len(texts), dtype=ROW)
    for row, text in zip(rows, texts, strict=True):
        words = word_hashes(text)
        row["text_sha256"], row["num_words"], row["sketch"] = text_sha256(text), len(words), sketch(words)
    return rows
