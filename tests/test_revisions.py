"""Revisions, experiments and their files in git."""

import subprocess
from pathlib import Path

import pytest

from pdf2lora.errors import InputError
from pdf2lora.evaluation.revisions import read_at, read_documents_at, resolve_commit


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: without the table, with the table (a tag), and the commit of a DVC experiment."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "empty")
    git("tag", "empty")
    (tmp_path / "metrics").mkdir()
    for name in ("first", "second"):
        (tmp_path / "metrics/eval_documents.csv").write_text(name)
        git("add", "--all")
        git("commit", "--quiet", "-m", name)
        git("tag", name)
    git("update-ref", "refs/exps/aa/bbbb/witty-name", "second")
    for baseline, revision in (("aa", "first"), ("cc", "second")):
        git("update-ref", f"refs/exps/{baseline}/bbbb/twice", revision)
    git("tag", "--delete", "second")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"), [("first", "first"), ("HEAD", "second"), ("HEAD~1", "first"), ("witty-name", "second")]
)
def test_the_table_of_a_revision_or_an_experiment(repository: Path, name: str, text: str) -> None:
    commit = resolve_commit(name, repository)

    assert len(commit) == 40
    assert read_documents_at(commit, repository) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "'nowhere' is not a git revision or an experiment"),
        ("--help", "'--help' is not a git revision"),
        ("twice", "several experiments are called 'twice'"),
    ],
)
def test_a_name_without_a_commit_is_refused(repository: Path, name: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        resolve_commit(name, repository)
    assert str(error.value).startswith(f"evaluate.compare_to: {words}")


def test_a_commit_without_the_table(repository: Path) -> None:
    with pytest.raises(InputError, match=r"has no metrics/eval_documents\.csv"):
        read_documents_at(resolve_commit("empty", repository), repository)


def test_outside_of_git(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a git revision or an experiment"):
        resolve_commit("HEAD", tmp_path)


def test_the_project_can_be_a_sub_folder_of_the_repository(repository: Path) -> None:
    assert read_at("first", "eval_documents.csv", repository / "metrics") == "first"
