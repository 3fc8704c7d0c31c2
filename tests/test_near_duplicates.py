import random

import numpy as np
import pytest
from helpers import prose

from pdf2lora.split import near_duplicates
from pdf2lora.split.near_duplicates import NUM_PERMUTATIONS, band_width, sketch
from pdf2lora.split.word_hashes import ngram_hashes, word_hashes


def edited(text: str, num_edits: int) -> str:
    """Replaces num_edits words, one per hundred words."""
    changed = text.split()
    for n in range(num_edits):
        changed[100 * n + 50] = "EDITED"
    return " ".join(changed)


def near_duplicate_groups(texts: list[str], similarity: float) -> list[list[int]]:
    sketches = [sketch(word_hashes(text)) for text in texts]
    return near_duplicates.near_duplicate_groups(
        np.array(sketches, dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS), similarity
    )


def long_texts(number: int) -> list[str]:
    return [prose(seed, num_words=500) for seed in range(number)]


def test_near_duplicates_are_one_group() -> None:
    one, two, three = long_texts(3)
    texts = [one, two, edited(one, 3), three, edited(two, 2), edited(one, 1)]
    assert near_duplicate_groups(texts, 0.7) == [[0, 2, 5], [1, 4], [3]]


def test_a_lower_similarity_makes_larger_groups() -> None:
    [text] = long_texts(1)
    half = " ".join(text.split()[:250])
    assert near_duplicate_groups([text, half], 0.7) == [[0], [1]]
    assert near_duplicate_groups([text, half], 0.3) == [[0, 1]]


def test_texts_with_a_common_part_are_not_near_duplicates() -> None:
    for seed in range(20):
        tokens = prose(seed, num_words=450).split()
        assert len(near_duplicate_groups([" ".join(tokens[:350]), " ".join(tokens[100:])], 0.7)) == 2


def test_near_duplication_is_transitive() -> None:
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
def test_short_texts_are_groups(texts: list[str]) -> None:
    assert near_duplicate_groups(texts, 0.7) == [[n] for n in range(len(texts))]


def test_case_and_punctuation_do_not_matter() -> None:
    [text] = long_texts(1)
    assert near_duplicate_groups([text, text.upper().replace(" ", ", ")], 0.9) == [[0, 1]]


@pytest.mark.parametrize("similarity", [0.95, 1.0])
def test_a_similarity_of_one_groups_equal_texts(similarity: float) -> None:
    text = " ".join(f"word{n}" for n in range(300))

    assert near_duplicate_groups([text, text, text + " more"], similarity)[0][:2] == [0, 1]


def chinese(seed: int, num_characters: int = 400) -> str:
    """Random Chinese characters without spaces, in phrases of 12 characters."""
    rng = random.Random(seed)
    characters = "".join(chr(rng.randrange(0x4E00, 0x5000)) for _ in range(num_characters))
    return "，".join(characters[start : start + 12] for start in range(0, num_characters, 12))


def test_chinese_texts_are_compared_by_characters() -> None:
    firsts = [chinese(seed) for seed in range(4)]
    seconds = [first[:150] + "新版" + first[150:].replace("，", "、", 3) for first in firsts]
    assert near_duplicate_groups(firsts + seconds, 0.7) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_sketches_estimate_the_jaccard_similarity(share: float) -> None:
    """The estimate has no bias, and the standard error of independent permutations."""
    errors, similarities = [], []
    for seed in range(100):
        rng = random.Random(seed)
        first = [f"w{rng.randrange(3000)}" for _ in range(600)]
        kept = round(share * len(first))
        second = first[:kept] + [f"w{rng.randrange(3000)}" for _ in range(len(first) - kept)]
        words = [word_hashes(" ".join(text)) for text in (first, second)]
        shingles = [set(ngram_hashes(text, 5).tolist()) for text in words]
        similarities.append(len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1]))
        errors.append((sketch(words[0]) == sketch(words[1])).mean() - similarities[-1])
    mean = np.mean(similarities)
    expected = (mean * (1 - mean) / NUM_PERMUTATIONS) ** 0.5
    assert abs(np.mean(errors)) < 3 * expected / len(errors) ** 0.5
    assert 0.75 * expected < np.std(errors) < 1.25 * expected


@pytest.mark.parametrize("similarity", [0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_few_pairs_of_the_wanted_similarity_are_missed(similarity: float) -> None:
    width = band_width(similarity)
    missed = (1 - similarity**width) ** (NUM_PERMUTATIONS // width)
    wider = (1 - similarity ** (width + 1)) ** (NUM_PERMUTATIONS // (width + 1)) if width < NUM_PERMUTATIONS else 1
    assert missed <= 0.01 < wider


def sketches_at(rng: np.random.Generator, similarity: float, count: int) -> np.ndarray:
    """Pairs of sketches of which each entry is equal with this probability."""
    firsts = rng.integers(2**32, size=(count, NUM_PERMUTATIONS), dtype=np.uint32)
    others = rng.integers(2**32, size=firsts.shape, dtype=np.uint32)
    return np.concatenate([firsts, np.where(rng.random(firsts.shape) < similarity, firsts, others)])


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_groups_equal_those_of_a_comparison_of_all_pairs(similarity: float) -> None:
    """Some pairs are above the limit, some below. A pair is missed with a probability of at most 1%."""
    rng = np.random.default_rng(1)
    sketches = np.concatenate([sketches_at(rng, s, 60) for s in (similarity - 0.15, similarity + 0.05, 0.99)])
    equal = (sketches[:, np.newaxis] == sketches).mean(axis=2) >= similarity
    groups = near_duplicates.near_duplicate_groups(sketches, similarity)
    assert sum(map(len, groups)) == len(sketches)
    assert all(equal[np.ix_(group, group)].all() for group in groups)
    assert sum(len(group) ** 2 for group in groups) >= 0.99 * equal.sum()


def test_many_copies_are_one_group_in_a_short_time() -> None:
    rng = np.random.default_rng(1)
    copies = np.repeat(sketches_at(rng, 1.0, 1)[:1], 20_000, axis=0)
    [first, *others] = near_duplicates.near_duplicate_groups(np.concatenate([copies, sketches_at(rng, 0.0, 5)]), 0.7)
    assert len(first) == 20_000
    assert others == [[20_000 + n] for n in range(10)]
