"""The short form of tools/torture.py: two rounds over the stages before find_batch. The long one: `make torture`."""

import random

import pytest

from tools.clones import Failed
from tools.torture import Blow, Project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("torture"), targets=("split", "convert"))


@pytest.mark.parametrize(("stage", "target"), [("extract", "dvc"), ("convert", "all")])
def test_after_kill_9_the_next_run_gives_the_same_hashes(project: Project, stage: str, target: str) -> None:
    assert "hashes the same" in project.repro(stage, Blow(target), random.Random(1))


def test_other_hashes_are_found(project: Project) -> None:
    with pytest.raises(Failed, match="other hashes: data/split"):
        project._compare(project.expected | {"data/split": "0"}, "after 1 s")
