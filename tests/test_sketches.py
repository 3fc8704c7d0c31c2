import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from helpers import prose

from pdf2lora.documents.text import text_sha256
from pdf2lora.runtime import parallel
from pdf2lora.runtime.parallel import Workers
from pdf2lora.split import sketches
from pdf2lora.split.near_duplicates import sketch
from pdf2lora.split.word_hashes import word_hashes

TEXTS = [prose(seed) for seed in range(6)]


def sketch_texts(texts: Iterable[str], cache: Path) -> tuple[sketches.Rows, int]:
    with Workers() as workers:
        return sketches.sketch_texts(texts, cache, workers.map)


def test_a_row_has_hash_words_and_sketch_of_its_text(tmp_path: Path) -> None:
    rows, num_new = sketch_texts(iter(TEXTS), tmp_path / "cache.npy")
    assert num_new == len(rows) == 6
    for row, text in zip(rows, TEXTS, strict=True):
        assert row["text_sha256"].decode() == text_sha256(text)
        assert row["num_words"] == len(text.split())
        assert (row["sketch"] == sketch(word_hashes(text))).all()


def test_only_new_texts_are_sketched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.npy"
    sketch_texts(TEXTS[:4], cache)
    sketched: list[int] = []
    monkeypatch.setattr(sketches, "word_hashes", lambda text: sketched.append(TEXTS.index(text)) or word_hashes(text))
    rows, num_new = sketch_texts([TEXTS[n] for n in (5, 1, 5, 3)], cache)
    assert (sketched, num_new) == ([5], 1)
    assert [row["text_sha256"].decode() for row in rows] == [text_sha256(TEXTS[n]) for n in (5, 1, 5, 3)]
    assert sketch_texts([TEXTS[3], TEXTS[0]], cache)[1] == 1  # the cache has the texts of the last run


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "batches", lambda texts: parallel.batches(texts, 1))  # each text is a batch
    tables = []
    for num_cores in (1, 2):
        monkeypatch.setattr(parallel, "num_cores", lambda: num_cores)  # noqa: B023
        tables.append(sketch_texts(TEXTS, tmp_path / f"{num_cores}.npy")[0])
    order = random.Random(1).sample(range(6), 6)
    tables.append(sketch_texts([TEXTS[n] for n in order], tmp_path / "order.npy")[0][np.argsort(order)])
    assert tables[0].tobytes() == tables[1].tobytes() == tables[2].tobytes()


def test_no_texts(tmp_path: Path) -> None:
    rows, num_new = sketch_texts([], tmp_path / "cache.npy")
    assert (len(rows), num_new, rows["sketch"].shape) == (0, 0, (0, 128))
