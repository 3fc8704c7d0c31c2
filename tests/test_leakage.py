from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdf2lora.runtime import parallel
from pdf2lora.runtime.parallel import Workers
from pdf2lora.split import leakage as module


def leakage(train: list[str], test: list[str]) -> float | None:
    with TemporaryDirectory() as folder, Workers() as workers:
        share = module.leakage(train, test, Path(folder), workers)
        assert list(Path(folder).iterdir()) == []
    return share


def numbered(*spans: Iterable[int]) -> str:
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
def test_leakage_equals_a_plain_count(train: list[str], test: list[str]) -> None:
    def ngrams(texts: list[str]) -> list[tuple[str, ...]]:
        return [tuple(text.split()[n : n + 13]) for text in texts for n in range(len(text.split()) - 12)]

    train_ngrams, test_ngrams = set(ngrams(train)), ngrams(test)
    num_common = sum(ngram in train_ngrams for ngram in test_ngrams)
    assert leakage(train, test) == (num_common / len(test_ngrams) if test_ngrams else None)


def test_leakage_of_chinese_text_counts_characters() -> None:
    text = "未来几十年洪水风险将会增加农业灌溉需求上升"
    assert leakage([text], [text]) == 1.0
    assert leakage([text], ["城市供水面临压力数据和模型模拟分析"]) == 0.0


def test_many_13_grams_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    train = [numbered(range(10_000), range(20_000, 30_000))]
    test = [numbered(range(n, n + 500)) for n in range(0, 20_000, 500)]
    exact = leakage(train, test)
    monkeypatch.setattr(module, "MAX_TEST_NGRAMS", 5_000)
    hashes, max_hash = module._collect(test, Workers())
    assert 2_000 < len(hashes) <= 5_000
    assert (hashes <= max_hash).all()
    sampled = leakage(train, test)
    assert exact == 0.5
    assert sampled not in (exact, None)
    assert sampled == pytest.approx(exact, abs=3 * 0.5 / 2_000**0.5)


def test_texts_are_compared_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text is its own batch."""
    texts = [numbered(range(n, n + 20)) for n in range(0, 200, 10)]
    expected = leakage(texts[:10], texts[5:])
    monkeypatch.setattr(module, "batches", lambda texts: parallel.batches(texts, 1))
    assert leakage(texts[:10], texts[5:]) == expected == 40 / 120


def test_two_runs_with_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As two experiments do, which share .scratch of the main checkout."""

    def other_run(texts: list[str]) -> Iterator[str]:
        with Workers() as workers:
            assert module.leakage([numbered(range(13))], [numbered(range(13))], tmp_path, workers) == 1.0
        yield from texts

    with Workers() as workers:
        share = module.leakage(other_run([numbered(range(26))]), [numbered(range(20, 40))], tmp_path, workers)

    assert share == 0.0
