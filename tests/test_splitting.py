import random
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import make_document, prose
from hypothesis import given, settings
from hypothesis import strategies as st
from test_near_duplicates import edited, long_texts

from pdf2lora.documents.records import Document
from pdf2lora.documents.text import text_sha256
from pdf2lora.errors import InputError
from pdf2lora.split import splitting
from pdf2lora.split.near_duplicates import NUM_PERMUTATIONS, near_duplicate_groups, sketch
from pdf2lora.split.word_hashes import word_hashes

Splits = dict[str, list[Document]]


@cache
def sketch_of(text: str) -> Any:
    return sketch(word_hashes(text))


def split(documents: list[Document], *, similarity: float, **settings: Any) -> Splits:
    """The documents of each split."""
    sketches = [sketch_of(document.text) for document in documents]
    groups = near_duplicate_groups(np.array(sketches, dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS), similarity)
    numbers = splitting.split([text_sha256(document.text) for document in documents], groups, **settings)
    return {name: [documents[number] for number in split] for name, split in numbers.items()}


def documents(number: int, first_seed: int = 0) -> list[Document]:
    return [make_document(f"{seed}.pdf", prose(seed)) for seed in range(first_seed, first_seed + number)]


def split_documents(documents: list[Document], seed: int = 0, test: float = 0.1, validation: float = 0.05) -> Splits:
    return split(documents, test_fraction=test, validation_fraction=validation, similarity=0.7, seed=seed)


def split_by_text(splits: Splits) -> dict[str, str]:
    return {text_sha256(document.text): name for name, documents in splits.items() for document in documents}


@pytest.fixture
def no_near_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes each document its own group, which is much faster."""
    own = sys.modules[__name__]
    monkeypatch.setattr(own, "sketch_of", lambda text: np.zeros(NUM_PERMUTATIONS))
    monkeypatch.setattr(own, "near_duplicate_groups", lambda sketches, similarity: [[n] for n in range(len(sketches))])


@pytest.mark.parametrize(
    ("number", "test", "validation", "sizes"),
    [
        (40, 0.1, 0.05, {"train": 34, "validation": 2, "test": 4}),
        (40, 0.1, 0.0, {"train": 36, "validation": 0, "test": 4}),
        (40, 0.25, 0.5, {"train": 10, "validation": 20, "test": 10}),
        (5, 0.1, 0.05, {"train": 3, "validation": 1, "test": 1}),
        (3, 0.1, 0.05, {"train": 1, "validation": 1, "test": 1}),
        (3, 0.9, 0.05, {"train": 1, "validation": 1, "test": 1}),
        (3, 0.05, 0.9, {"train": 1, "validation": 1, "test": 1}),
        (2, 0.1, 0.0, {"train": 1, "validation": 0, "test": 1}),
    ],
)
def test_each_split_has_its_fraction_and_at_least_one_document(
    number: int, test: float, validation: float, sizes: dict[str, int]
) -> None:
    corpus = documents(number)
    splits = split_documents(corpus, test=test, validation=validation)
    assert {name: len(split) for name, split in splits.items()} == sizes
    assert Counter(d.id for split in splits.values() for d in split) == Counter(d.id for d in corpus)


@pytest.mark.parametrize(("number", "validation"), [(0, 0.05), (1, 0.05), (2, 0.05), (1, 0.0), (0, 0.0)])
def test_too_few_documents_are_refused(number: int, validation: float) -> None:
    with pytest.raises(InputError, match=f"{number} usable documents in {number} groups .*train, .*test need"):
        split_documents(documents(number), validation=validation)


def test_a_corpus_of_copies_is_refused() -> None:
    copies = [make_document(f"{n}.pdf", prose(1)) for n in range(9)]
    with pytest.raises(InputError, match=r"9 usable documents in 1 groups .*need at least 3 groups\. Add PDFs\.$"):
        split_documents(copies)


def test_names_and_order_do_not_matter() -> None:
    corpus = documents(10) + [make_document("copy.pdf", edited(text, n)) for text in long_texts(5) for n in range(4)]
    renamed = [replace(d, id=f"other/{n}.pdf", sha256="other bytes") for n, d in enumerate(corpus)]
    random.Random(1).shuffle(renamed)
    first, second = split_documents(corpus), split_documents(renamed)
    assert split_by_text(first) == split_by_text(second)
    assert [[d.text for d in first[name]] for name in first] == [[d.text for d in second[name]] for name in first]


def test_another_seed_results_in_another_split() -> None:
    corpus = documents(30)
    assert split_documents(corpus, seed=1) == split_documents(corpus, seed=1)
    tests = {frozenset(d.id for d in split_documents(corpus, seed=seed)["test"]) for seed in range(5)}
    assert len(tests) > 2


@pytest.mark.usefixtures("no_near_duplicates")
def test_every_document_is_in_test_for_some_seed() -> None:
    corpus = documents(20)
    num_tests = Counter(d.id for seed in range(300) for d in split_documents(corpus, seed=seed)["test"])
    assert len(num_tests) == 20
    assert min(num_tests.values()) > 10
    assert max(num_tests.values()) < 60


@pytest.mark.usefixtures("no_near_duplicates")
@pytest.mark.parametrize("number", [24, 25, 29, 34, 40])
def test_an_additional_document_moves_at_most_one_other_across_a_boundary(number: int) -> None:
    *corpus, additional = documents(number + 1)
    moves: Counter[tuple[str, str]] = Counter()
    for seed in range(100):
        before = split_by_text(split_documents(corpus, seed))
        after = split_by_text(split_documents([*corpus, additional], seed))
        moves_of_seed = Counter((before[text], after[text]) for text in before if before[text] != after[text])
        assert set(moves_of_seed.values()) <= {1}
        assert not {("train", "test"), ("test", "train")} & set(moves_of_seed)
        moves += moves_of_seed
    assert moves


def test_near_duplicates_are_in_one_split() -> None:
    families = [[edited(text, number) for number in range(3)] for text in long_texts(8)]
    corpus = [make_document(f"{n}-{m}.pdf", text) for n, family in enumerate(families) for m, text in enumerate(family)]
    for seed in range(20):
        splits = split_by_text(split_documents(corpus, seed, test=0.2, validation=0.2))
        assert all(len({splits[text_sha256(text)] for text in family}) == 1 for family in families)
        assert set(splits.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize("num_others", [2, 40])
def test_a_large_group_of_near_duplicates_is_in_train(num_others: int) -> None:
    [text] = long_texts(1)
    copies = [make_document(f"copy-{number}.pdf", f"{text} {number}") for number in range(10)]
    for seed in range(10):
        splits = split_documents(documents(num_others) + copies, seed)
        assert {d.id for d in copies} <= {d.id for d in splits["train"]}
        assert [len(splits[name]) for name in ("test", "validation")] == ([1, 1] if num_others == 2 else [5, 3])


def test_the_smallest_groups_are_held_out_if_all_are_large() -> None:
    families = [[edited(text, n) for n in range(size)] for text, size in zip(long_texts(3), (4, 2, 3), strict=True)]
    corpus = [make_document(f"{n}-{m}.pdf", text) for n, family in enumerate(families) for m, text in enumerate(family)]
    splits = split_documents(corpus)
    assert {name: len(split) for name, split in splits.items()} == {"test": 2, "validation": 3, "train": 4}


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    seeds=st.lists(st.integers(0, 40), min_size=4, max_size=16),
    test_fraction=st.floats(0.05, 0.45),
    validation_fraction=st.sampled_from([0.0, 0.1, 0.3]),
    order=st.randoms(use_true_random=False),
)
def test_a_split_is_complete_disjoint_and_independent_of_order_and_names(
    seeds: list[int], test_fraction: float, validation_fraction: float, order: random.Random
) -> None:
    """Equal seeds make equal texts, which must be in one split."""
    texts = [prose(seed) for seed in seeds]
    if len(set(texts)) < 3:
        return
    settings_ = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    corpus = [make_document(f"{number}.pdf", text) for number, text in enumerate(texts)]
    splits = split(corpus, **settings_, similarity=0.7, seed=1)
    shuffled = [replace(document, id=f"renamed-{document.id}") for document in corpus]
    order.shuffle(shuffled)

    assert Counter(d.id for split in splits.values() for d in split) == Counter(d.id for d in corpus)
    texts_of = {name: {d.text for d in documents} for name, documents in splits.items()}
    assert sum(map(len, texts_of.values())) == len(set(texts))
    assert all(texts_of[name] for name in ("train", "test"))
    again = split(shuffled, **settings_, similarity=0.7, seed=1)
    assert {name: [d.text for d in documents] for name, documents in again.items()} == {
        name: [d.text for d in documents] for name, documents in splits.items()
    }


def test_groups_are_numbered_in_the_order_of_the_documents() -> None:
    assert splitting.group_numbers([5, 2, 7, 3], [[2, 5], [3], [7], [9]]) == [0, 0, 1, 2]
