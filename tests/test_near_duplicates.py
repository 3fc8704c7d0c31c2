import random

import pytest
from conftest import prose

from pdf2lora.documents.near_duplicates import near_duplicate_groups


def edited(text: str, num_edits: int) -> str:
    """Replaces num_edits words, one per hundred words."""
    changed = text.split()
    for n in range(num_edits):
        changed[100 * n + 50] = "EDITED"
    return " ".join(changed)


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
