import math
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pdf2lora.errors import InputError
from pdf2lora.evaluation.comparison import Comparison, commit_of, compare, documents_at, in_words

SETTINGS = {"num_samples": 2000, "seed": 0}


def table(perplexities: list[float], tokens: list[int] | None = None, first: int = 0) -> pd.DataFrame:
    """As evaluate writes it; a byte a token."""
    counts = tokens or [100] * len(perplexities)
    ids = [f"{first + number}.pdf" for number in range(len(perplexities))]
    return pd.DataFrame({"id": ids, "bytes": counts, "tokens": counts, "adapted_perplexity": perplexities})


def test_perplexities_are_those_over_all_tokens() -> None:
    compared = compare(table([10.0, 40.0], [300, 100]), table([20.0, 50.0], [300, 100]), **SETTINGS)

    assert compared.now == pytest.approx(math.exp((300 * math.log(10) + 100 * math.log(40)) / 400))
    assert compared.before == pytest.approx(math.exp((300 * math.log(20) + 100 * math.log(50)) / 400))
    assert compared.improvement == pytest.approx(1 - compared.now / compared.before)
    assert (compared.documents, compared.left_out, compared.improved) == (2, 0, 2)


def test_a_small_difference_that_every_document_has_shows_through_large_ones_between_documents() -> None:
    """The reason for pairing: the perplexities lie between 5 and 500, the difference is one percent."""
    rng = np.random.default_rng(0)
    hard = np.exp(rng.uniform(math.log(5), math.log(500), size=40))
    now = hard * 0.99 * np.exp(rng.normal(0, 0.01, size=40))

    compared = compare(table(list(now)), table(list(hard)), **SETTINGS)

    assert compared.differs
    assert 0 < compared.low < 0.01 < compared.high < 0.02
    unpaired = [np.log(values)[rng.integers(40, size=(2000, 40))].mean(axis=1) for values in (now, hard)]
    low, high = np.quantile(1 - np.exp(unpaired[0] - unpaired[1]), [0.025, 0.975])
    assert low < 0 < high


def test_noise_is_no_difference() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(20, 30, size=30)

    compared = compare(table(list(before * np.exp(rng.normal(0, 0.02, size=30)))), table(list(before)), **SETTINGS)

    assert not compared.differs
    assert compared.low < 0 < compared.high


@pytest.mark.parametrize("effect", [0.0, 0.02])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(effect: float) -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        before = rng.uniform(20, 30, size=50)
        now = before * (1 - effect) * np.exp(rng.normal(0, 0.03, size=50))
        compared = compare(table(list(now)), table(list(before)), num_samples=400, seed=0)
        hits += compared.low <= effect <= compared.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_same_again_gives_the_same_and_no_difference() -> None:
    now = table([3.0, 7.0, 12.0])

    compared = compare(now, now.copy(), **SETTINGS)

    assert (compared.improvement, compared.low, compared.high, compared.improved) == (0, 0, 0, 0)
    assert not compared.differs
    assert compare(now, table([4.0, 7.0, 13.0]), **SETTINGS) == compare(now, table([4.0, 7.0, 13.0]), **SETTINGS)


def test_only_documents_of_both_are_compared() -> None:
    compared = compare(table([10.0, 20.0, 30.0], first=1), table([11.0, 11.0, 21.0], first=0), **SETTINGS)

    assert (compared.documents, compared.left_out) == (2, 1)
    assert compared.now == pytest.approx(math.sqrt(10 * 20))


def test_documents_with_other_tokens_are_others() -> None:
    with pytest.raises(InputError, match=r"no test document of then is one of now \(same id, bytes and tokens\)"):
        compare(table([10.0], [100]), table([10.0], [90]), **SETTINGS)


@pytest.mark.parametrize(
    ("improvement", "low", "high", "words"),
    [
        (0.02, 0.01, 0.03, "2.0% lower [1.0%, 3.0%], better on 3 of 4 documents: more than the choice of"),
        (-0.02, -0.03, -0.01, "2.0% higher [1.0%, 3.0%], better on 3 of 4 documents: more than the choice of"),
        (
            0.002,
            -0.01,
            0.01,
            "0.2% lower [-1.0%, 1.0%], better on 3 of 4 documents: no difference that these documents",
        ),
    ],
)
def test_in_words(improvement: float, low: float, high: float, words: str) -> None:
    compared = Comparison(4, 0, before=50.0, now=49.0, improvement=improvement, low=low, high=high, improved=3)

    said = in_words("main", "0123456789", compared)

    assert said.startswith(f"main (0123456): perplexity 50.00 -> 49.00, {words}")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: without the table, with it (a tag), and one that a DVC experiment's reference points to."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "empty")
    git("tag", "empty")
    (tmp_path / "metrics").mkdir()
    for name, perplexity in (("first", 5.0), ("second", 6.0)):
        table([perplexity]).to_csv(tmp_path / "metrics/eval_documents.csv", index=False)
        git("add", "--all")
        git("commit", "--quiet", "-m", name)
        git("tag", name)
    git("update-ref", "refs/exps/aa/bbbb/witty-name", "second")
    for baseline, revision in (("aa", "first"), ("cc", "second")):
        git("update-ref", f"refs/exps/{baseline}/bbbb/twice", revision)
    git("tag", "--delete", "second")
    return tmp_path


@pytest.mark.parametrize(("name", "perplexity"), [("first", 5.0), ("HEAD", 6.0), ("HEAD~1", 5.0), ("witty-name", 6.0)])
def test_the_table_of_a_revision_or_an_experiment(repository: Path, name: str, perplexity: float) -> None:
    commit = commit_of(name, repository)

    assert len(commit) == 40
    assert documents_at(commit, repository)["adapted_perplexity"].tolist() == [perplexity]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "nowhere",
            "evaluate.compare_to: 'nowhere' is no git revision and no experiment; see git log and dvc exp show",
        ),
        ("--help", "evaluate.compare_to: '--help' is no git revision"),
        ("twice", "evaluate.compare_to: 'twice' names several experiments, give the commit of one"),
    ],
)
def test_a_name_that_cannot_be_compared_with(repository: Path, name: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        commit_of(name, repository)
    assert str(refused.value).startswith(words)


def test_a_commit_without_the_table(repository: Path) -> None:
    with pytest.raises(InputError, match=r"has no metrics/eval_documents.csv; choose one after evaluate, or 'none'"):
        documents_at(commit_of("empty", repository), repository)


def test_outside_of_git(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no git revision and no experiment"):
        commit_of("HEAD", tmp_path)
