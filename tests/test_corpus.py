import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import prose
from hypothesis import given, settings
from hypothesis import strategies as st

from pdf2lora.documents import splitting
from pdf2lora.documents.leakage import leakage
from pdf2lora.documents.near_duplicates import near_duplicate_groups
from pdf2lora.documents.records import Document, read_documents, write_documents
from pdf2lora.documents.splitting import split
from pdf2lora.documents.text import text_sha256, words

Sides = dict[str, list[Document]]


def document(text: str, name: str = "a.pdf") -> Document:
    return Document(
        id=name,
        sha256=text_sha256(name),
        num_pages=1,
        pages_read=1,
        engine="pypdf2",
        attempts={"pypdf2": "complete"},
        characters_raw=len(text),
        characters=len(text),
        reason=None,
        text=text,
    )


def documents(number: int, first_seed: int = 0) -> list[Document]:
    return [document(prose(seed), f"{seed}.pdf") for seed in range(first_seed, first_seed + number)]


def split_shipped(of: list[Document], seed: int = 0, test: float = 0.1, validation: float = 0.05) -> Sides:
    return split(of, test_fraction=test, validation_fraction=validation, similarity=0.7, seed=seed)


def side_of_text(sides: Sides) -> dict[str, str]:
    return {text_sha256(document.text): side for side, inside in sides.items() for document in inside}


@pytest.fixture
def no_near_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many splits in little time: each document is a group of its own."""
    monkeypatch.setattr(splitting, "near_duplicate_groups", lambda texts, similarity: [[n] for n in range(len(texts))])


@pytest.mark.parametrize(
    "text",
    ["", "plain", 'a "quoted" \\ text', "one\ntwo\r\nthree\rfour", "\u2028 \u2029 \u0085 \x0b\x0c", "海 🌊 é ﬁ \u200c"],
)
def test_documents_come_back_as_they_were_written(tmp_path: Path, text: str) -> None:
    left_out = replace(document(""), reason="encrypted", engine=None, num_pages=None, attempts={})
    written = [document(text, f"Käse/{text}.pdf"), left_out, document("another")]
    write_documents(tmp_path / "documents.jsonl", written)
    assert read_documents(tmp_path / "documents.jsonl") == written
    assert (tmp_path / "documents.jsonl").read_bytes().count(b"\n") == 3


def test_letters_are_written_as_letters(tmp_path: Path) -> None:
    write_documents(tmp_path / "documents.jsonl", [document("海が")])
    assert "海が".encode() in (tmp_path / "documents.jsonl").read_bytes()


def test_words_know_neither_case_nor_signs() -> None:
    assert words("The SEA, level-rise (2.5 cm): Ärger!") == ["the", "sea", "level", "rise", "2", "5", "cm", "ärger"]


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
def test_each_side_has_its_share_and_one_at_least(
    number: int, test: float, validation: float, sizes: dict[str, int]
) -> None:
    of = documents(number)
    sides = split_shipped(of, test=test, validation=validation)
    assert {side: len(inside) for side, inside in sides.items()} == sizes
    assert Counter(document.id for inside in sides.values() for document in inside) == Counter(d.id for d in of)


@pytest.mark.parametrize(("number", "validation"), [(0, 0.05), (1, 0.05), (2, 0.05), (1, 0.0), (0, 0.0)])
def test_too_few_documents_cannot_be_split(number: int, validation: float) -> None:
    with pytest.raises(ValueError, match=f"{number} groups of documents cannot fill train, .*test"):
        split_shipped(documents(number), validation=validation)


def test_copies_of_one_text_cannot_be_split() -> None:
    copies = [document(prose(1), f"{n}.pdf") for n in range(9)]
    with pytest.raises(ValueError, match="1 groups of documents cannot fill train, validation, test"):
        split_shipped(copies)


def test_neither_names_nor_order_matter() -> None:
    of = documents(10) + [document(edited(text, n), "copy.pdf") for text in long_texts(5) for n in range(4)]
    renamed = [replace(d, id=f"other/{n}.pdf", sha256="other bytes") for n, d in enumerate(of)]
    random.Random(1).shuffle(renamed)
    first, second = split_shipped(of), split_shipped(renamed)
    assert side_of_text(first) == side_of_text(second)
    assert [[d.text for d in first[side]] for side in first] == [[d.text for d in second[side]] for side in first]


def test_another_seed_is_another_split() -> None:
    of = documents(30)
    assert split_shipped(of, seed=1) == split_shipped(of, seed=1)
    tests = {frozenset(d.id for d in split_shipped(of, seed=seed)["test"]) for seed in range(5)}
    assert len(tests) > 2


@pytest.mark.usefixtures("no_near_duplicates")
def test_every_document_is_tested_under_some_seed() -> None:
    of = documents(20)
    tested = Counter(d.id for seed in range(300) for d in split_shipped(of, seed=seed)["test"])
    assert len(tested) == 20
    assert min(tested.values()) > 10
    assert max(tested.values()) < 60


@pytest.mark.usefixtures("no_near_duplicates")
@pytest.mark.parametrize("number", [24, 25, 29, 34, 40])
def test_an_added_document_shifts_one_other_over_a_boundary_at_the_most(number: int) -> None:
    *of, added = documents(number + 1)
    moves: Counter[tuple[str, str]] = Counter()
    for seed in range(100):
        before, after = side_of_text(split_shipped(of, seed)), side_of_text(split_shipped([*of, added], seed))
        moved = Counter((before[text], after[text]) for text in before if before[text] != after[text])
        assert set(moved.values()) <= {1}
        assert not {("train", "test"), ("test", "train")} & set(moved)
        moves += moved
    assert moves


def edited(text: str, number_of_edits: int) -> str:
    """Other words in a few places, one edit for each hundred words at the most."""
    changed = text.split()
    for n in range(number_of_edits):
        changed[100 * n + 50] = "EDITED"
    return " ".join(changed)


def long_texts(number: int) -> list[str]:
    return [prose(seed, num_words=500) for seed in range(number)]


def test_near_duplicates_are_one_group_and_others_are_not() -> None:
    one, two, three = long_texts(3)
    texts = [one, two, edited(one, 3), three, edited(two, 2), edited(one, 1)]
    assert near_duplicate_groups(texts, 0.7) == [[0, 2, 5], [1, 4], [3]]


def test_similarity_decides_what_is_a_near_duplicate() -> None:
    [text] = long_texts(1)
    half = " ".join(text.split()[:250])
    assert near_duplicate_groups([text, half], 0.7) == [[0], [1]]
    assert near_duplicate_groups([text, half], 0.3) == [[0, 1]]


def test_texts_that_are_somewhat_alike_are_not_near_duplicates() -> None:
    for seed in range(60):
        tokens = prose(seed, num_words=450).split()
        assert len(near_duplicate_groups([" ".join(tokens[:350]), " ".join(tokens[100:])], 0.7)) == 2


def test_likeness_carries_over() -> None:
    tokens = prose(1, num_words=1000).split()
    chain = [" ".join(tokens[start : start + 600]) for start in range(0, 401, 50)]
    assert len(near_duplicate_groups([chain[0], chain[-1]], 0.7)) == 2
    assert len(near_duplicate_groups(chain, 0.7)) == 1


def test_groups_do_not_depend_on_the_order() -> None:
    texts = [edited(text, number) for text in long_texts(6) for number in range(3)]
    shuffled = random.Random(3).sample(texts, len(texts))
    groups, of_shuffled = (
        {frozenset(some[n] for n in group) for group in near_duplicate_groups(some, 0.7)} for some in (texts, shuffled)
    )
    assert groups == of_shuffled
    assert len(groups) == 6


@pytest.mark.parametrize("texts", [[], ["sea"], ["sea", "ice"], ["", "sea ice river rain"]])
def test_short_texts_are_groups_too(texts: list[str]) -> None:
    assert near_duplicate_groups(texts, 0.7) == [[n] for n in range(len(texts))]


def test_case_and_signs_do_not_make_another_text() -> None:
    [text] = long_texts(1)
    assert near_duplicate_groups([text, text.upper().replace(" ", ", ")], 0.9) == [[0, 1]]


def test_near_duplicates_stay_on_one_side() -> None:
    families = [[edited(text, number) for number in range(3)] for text in long_texts(8)]
    of = [document(text, f"{n}-{m}.pdf") for n, family in enumerate(families) for m, text in enumerate(family)]
    for seed in range(20):
        side = side_of_text(split_shipped(of, seed, test=0.2, validation=0.2))
        assert all(len({side[text_sha256(text)] for text in family}) == 1 for family in families)
        assert set(side.values()) == {"train", "validation", "test"}


def numbered(*spans: range) -> str:
    return " ".join(f"w{n}" for span in spans for n in span)


@pytest.mark.parametrize(
    ("train", "test", "share"),
    [
        ([numbered(range(26))], [numbered(range(26))], 1.0),
        ([numbered(range(26))], [numbered(range(5, 20))], 1.0),
        ([numbered(range(26))], [numbered(range(100, 126))], 0.0),
        ([numbered(range(15))], [numbered(range(26))], 3 / 14),
        ([numbered(range(15))], [numbered(range(13)), numbered(range(50, 65))], 1 / 4),
        ([numbered(range(15))], [numbered(range(13)), "short"], 1.0),
        ([numbered(range(12))], [numbered(range(13))], 0.0),
        ([numbered(range(7)), numbered(range(7, 13))], [numbered(range(13))], 0.0),
        ([numbered(reversed(range(13)))], [numbered(range(13))], 0.0),
        (["The sea, the ICE! " * 4], ["the Sea the ice " * 4], 1.0),
        ([numbered(range(13))], [numbered(range(12))], None),
        ([numbered(range(13))], ["", "one two"], None),
    ],
)  # fmt: skip
def test_leakage_is_the_share_of_13_grams(train: list[str], test: list[str], share: float | None) -> None:
    assert leakage(train, test) == share


TWO_WORDS = st.lists(st.text("ab", min_size=0, max_size=30).map(" ".join), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TWO_WORDS, TWO_WORDS)
def test_leakage_agrees_with_counting(train: list[str], test: list[str]) -> None:
    def ngrams(texts: list[str]) -> list[tuple[str, ...]]:
        return [tuple(text.split()[n : n + 13]) for text in texts for n in range(len(text.split()) - 12)]

    seen, tested = set(ngrams(train)), ngrams(test)
    assert leakage(train, test) == (sum(ngram in seen for ngram in tested) / len(tested) if tested else None)


@pytest.mark.parametrize("similarity", [0.95, 1.0])
def test_a_similarity_of_one_groups_equal_texts(similarity):
    text = " ".join(f"word{n}" for n in range(300))

    assert near_duplicate_groups([text, text, text + " more"], similarity)[0][:2] == [0, 1]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seeds=st.lists(st.integers(0, 40), min_size=4, max_size=16),
    test_fraction=st.floats(0.05, 0.45),
    validation_fraction=st.sampled_from([0.0, 0.1, 0.3]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_is_whole_disjoint_and_the_same_for_every_order_and_name(
    seeds: list[int], test_fraction: float, validation_fraction: float, order: random.Random
) -> None:
    """Equal seeds are equal texts: they stay together."""
    texts = [prose(seed) for seed in seeds]
    if len(set(texts)) < 3:
        return
    settings_ = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    documents = [document(text, f"{number}.pdf") for number, text in enumerate(texts)]
    sides = split(documents, **settings_, similarity=0.7, seed=1)  # type: ignore[arg-type]
    shuffled = [replace(document, id=f"renamed-{document.id}") for document in documents]
    order.shuffle(shuffled)

    assert Counter(d.id for side in sides.values() for d in side) == Counter(d.id for d in documents)
    texts_of = {side: {d.text for d in kept} for side, kept in sides.items()}
    assert sum(map(len, texts_of.values())) == len(set(texts))
    assert all(texts_of[side] for side in ("train", "test"))
    again = split(shuffled, **settings_, similarity=0.7, seed=1)  # type: ignore[arg-type]
    assert {side: [d.text for d in kept] for side, kept in again.items()} == {
        side: [d.text for d in kept] for side, kept in sides.items()
    }
