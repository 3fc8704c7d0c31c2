"""Revisions, experiments and their files in git."""

import json
import subprocess
from pathlib import Path

import pytest

from pdf2lora.errors import InputError
from pdf2lora.evaluation.revisions import is_evaluated, read_at, read_documents_at, resolve_commit


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
        ("twice", "several experiments have the name 'twice'"),
    ],
)
def test_a_name_without_a_commit_is_refused(repository: Path, name: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        resolve_commit(name, repository)
    assert str(error.value).startswith(f"evaluate.compare_to: {words}")


def test_a_commit_without_the_table(repository: Path) -> None:
    with pytest.raises(InputError, match="is not evaluated"):
        read_documents_at(resolve_commit("empty", repository), repository)


def test_outside_of_git(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a git revision or an experiment"):
        resolve_commit("HEAD", tmp_path)


def test_the_project_can_be_a_sub_folder_of_the_repository(repository: Path) -> None:
    assert read_at("first", "eval_documents.csv", repository / "metrics") == "first"


def lock(adapter: str, split: str, evaluated_adapter: str, evaluated_test: str) -> str:
    return f"""
stages:
  split:
    outs: [{{path: data/split, md5: {split}.dir}}]
  train:
    outs: [{{path: models/adapter, md5: {adapter}}}]
  evaluate:
    deps:
    - {{path: data/split/test.jsonl, md5: {evaluated_test}}}
    - {{path: models/adapter, md5: {evaluated_adapter}}}
    - {{path: stages/evaluate.py, md5: other}}
"""


@pytest.mark.parametrize(
    ("text", "evaluated"),
    [
        (lock("a1", "aa1", "a1", "t1"), True),
        (lock("a2", "aa1", "a1", "t1"), False),
        (lock("a1", "aa2", "a1", "t1"), False),
        (lock("a1", "aa3", "a1", "t1"), True),  # the cache does not have the listing of data/split
        ("stages: {train: {outs: [{path: models/adapter, md5: a1}]}}", False),
    ],
)
def test_a_commit_is_evaluated_where_evaluate_read_the_current_outputs(
    repository: Path, text: str, evaluated: bool
) -> None:
    for name, md5 in (("1.dir", "t1"), ("2.dir", "t2")):
        file = repository / ".dvc/cache/files/md5/aa" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{"relpath": "test.jsonl", "md5": md5}]))
    (repository / "dvc.lock").write_text(text)
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["add", "dvc.lock"], [*names, "commit", "-qm", "lock"]):
        subprocess.run(["git", *command], cwd=repository, check=True)

    assert is_evaluated("HEAD", repository) == evaluated


def test_metrics_without_a_lock_count_as_evaluated(repository: Path) -> None:
    assert is_evaluated("first", repository)
