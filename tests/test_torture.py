"""The short forms of tests/long/torture.py and same_bytes.py, with stages before find_batch and one undisturbed run."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.long.clones import Failed
from tests.long.same_bytes import make_other_clone, require_same, run_stages
from tests.long.torture import (
    SAVE_STEPS,
    STAGES,
    Fault,
    Project,
    error_line,
    faults_of,
    first_step,
    require_newer,
    valid_checkpoints,
)

pytestmark = pytest.mark.timeout(600)  # the first test also makes the undisturbed run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The undisturbed run has one core and one thread."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        folder = tmp_path_factory.mktemp("torture")
        return Project(folder, targets=("split", "convert"), stages=("extract", "split", "convert"))
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(("stage", "target"), [("extract", "dvc"), ("convert", "all")])
def test_after_kill_9_the_next_run_gives_the_same_hashes(project: Project, stage: str, target: str) -> None:
    assert "hashes equal" in project.repro(stage, Fault(target), random.Random(1))


def test_a_clone_under_other_conditions_has_the_same_bytes(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "in another/folder"
    make_other_clone(other, short=True, seed=1, settings={"compute.num_processes": 1})
    run_stages(other, project.targets, num_threads=2)

    assert require_same(project.folder / "undisturbed", other) == len(project.expected)


def test_different_hashes_are_found(project: Project) -> None:
    with pytest.raises(Failed, match="different hashes: data/split"):
        project._compare(project.expected | {"data/split": "0"}, "after 1 s")


def test_training_that_began_before_the_last_checkpoint_is_found(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("INFO starts from .scratch/train/0f/checkpoint-8\n")
    assert first_step({log}, 8) == 8
    with pytest.raises(Failed, match=r"checkpoint-12 existed, training began at \[8\]"):
        first_step({log}, 12)
    log.write_text("INFO starts from the base model\n")
    with pytest.raises(Failed, match="checkpoint-8 existed, training began at the base model"):
        first_step({log}, 8)


def test_checkpoints_without_a_manifest_do_not_count(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        checkpoint = tmp_path / f".scratch/train/0f/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if step != 8:
            (checkpoint / "manifest.json").touch()

    assert sorted(valid_checkpoints(tmp_path)) == [4, 12]


def test_only_jobs_of_several_processes_have_faults_of_one_process() -> None:
    for stage in STAGES:
        assert not [fault for fault in faults_of(stage, 1) if fault.target == "process"]
    of_train = faults_of("train", 2)
    assert {fault.signum for fault in of_train if fault.target == "process"} == {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGTERM,
        None,
    }
    assert {fault.target for fault in of_train} == {"process", "stage", "dvc", "all"}


def test_signal_without_a_new_checkpoint_is_found() -> None:
    require_newer(4, [4, 5], last_step=29)
    with pytest.raises(Failed, match="no checkpoint after checkpoint-4"):
        require_newer(4, [4], last_step=29)
    require_newer(28, [28], last_step=28 + SAVE_STEPS)  # then the training may end before the signal arrives


def test_a_line_with_the_failed_process_is_required() -> None:
    line = "error: train: process 1 of 2 (pid 7) was ended by SIGKILL; run dvc repro again"
    assert error_line(f"Running stage 'train'\n{line}\nERROR: failed\n") == line
    stopped = "train: stopped by SIGTERM after step 8; a checkpoint is saved"
    assert error_line(f"{stopped}\n") == stopped
    for output in ("", "error: train: a process was ended", f"{line}\n{line}", f"Traceback\n{line}"):
        with pytest.raises(Failed, match="no line names the process"):
            error_line(output)
