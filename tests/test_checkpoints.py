"""Checkpoints: which ones are kept, and from which one a training resumes after damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdf2lora.errors import InputError
from pdf2lora.runtime.locks import exclusive_lock
from pdf2lora.runtime.manifest import MANIFEST
from pdf2lora.training.checkpoints import (
    STATE,
    latest_valid,
    load_checkpoint,
    remove_contents,
    save_checkpoint,
    step_of,
)

Damage = Callable[[Path], Any]


def state_of(step: int) -> dict[str, Any]:
    return {
        "parameters": torch.full((300,), float(step)),
        "progress": {"step": step, "best_loss": float("inf"), "history": [{"step": 1, "train/loss": 5.5}]},
        "best": None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the checkpoints of steps 8 and 10, whose names sort in another order."""
    for step in (6, 8, 10):
        save_checkpoint(tmp_path / "checkpoints", step, state_of(step))
    return tmp_path / "checkpoints"


def steps_in(folder: Path) -> set[int]:
    return {step_of(checkpoint) for checkpoint in folder.iterdir()}


def test_the_newest_two_are_kept(folder: Path) -> None:
    assert steps_in(folder) == {8, 10}

    save_checkpoint(folder, 12, state_of(12))

    assert steps_in(folder) == {10, 12}


def test_a_state_is_loaded_as_it_was_saved(folder: Path) -> None:
    checkpoint = latest_valid(folder, remove_corrupt=True)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-10"

    state, expected = load_checkpoint(checkpoint), state_of(10)

    assert torch.equal(state.pop("parameters"), expected.pop("parameters"))
    assert state == expected


def test_a_checkpoint_of_the_same_step_is_replaced(folder: Path) -> None:
    (folder / "checkpoint-10" / "half-written").touch()

    save_checkpoint(folder, 10, state_of(11))

    assert load_checkpoint(folder / "checkpoint-10")["progress"]["step"] == 11
    assert sorted(os.listdir(folder / "checkpoint-10")) == sorted([MANIFEST, STATE])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Damage] = {
    "a flipped bit": lambda checkpoint: flip_a_bit(checkpoint / STATE),
    "a short file": lambda checkpoint: os.truncate(checkpoint / STATE, 100),
    "an empty file": lambda checkpoint: os.truncate(checkpoint / STATE, 0),
    "a missing file": lambda checkpoint: (checkpoint / STATE).unlink(),
    "a file that is a folder": lambda checkpoint: ((checkpoint / STATE).unlink(), (checkpoint / STATE).mkdir()),
    "no manifest": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "half a manifest": lambda checkpoint: os.truncate(checkpoint / MANIFEST, 20),
    "a manifest that is a list": lambda checkpoint: (checkpoint / MANIFEST).write_text("[]"),
    "a manifest without files": lambda checkpoint: (checkpoint / MANIFEST).write_text("{}"),
    "a manifest of other types": lambda checkpoint: (checkpoint / MANIFEST).write_text('{"files": 3}'),
    "another file's hash": lambda checkpoint: (checkpoint / MANIFEST).write_text(
        json.dumps({"files": {STATE: "0" * 64}})
    ),
    "an empty folder": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_removed_and_the_one_before_is_used(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    DAMAGE[damage](folder / "checkpoint-10")

    assert latest_valid(folder, remove_corrupt=True) == folder / "checkpoint-8"

    assert steps_in(folder) == {8}
    assert load_checkpoint(folder / "checkpoint-8")["progress"]["step"] == 8
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train: checkpoint-10 ")


def test_a_checkpoint_that_another_process_writes_is_left_alone(folder: Path) -> None:
    newest = latest_valid(folder, remove_corrupt=True)
    (folder / "checkpoint-99").mkdir()
    (folder / "checkpoint-99" / STATE).write_bytes(b"half")

    assert latest_valid(folder, remove_corrupt=False) == newest
    assert (folder / "checkpoint-99" / STATE).exists()


def test_without_a_valid_checkpoint_there_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in folder.iterdir():
        flip_a_bit(checkpoint / STATE)

    assert latest_valid(folder, remove_corrupt=True) is None

    assert list(folder.iterdir()) == []
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert latest_valid(folder / "nowhere", remove_corrupt=True) is None


def test_other_files_of_the_folder_are_left_alone(folder: Path) -> None:
    """For example the lock of the run."""
    (folder / "lock").write_text("123")

    save_checkpoint(folder, 12, state_of(12))

    assert latest_valid(folder, remove_corrupt=True) == folder / "checkpoint-12"
    assert (folder / "lock").read_text() == "123"


def test_code_in_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    """A pickle can run any program when it is loaded."""

    class Program:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save(Program(), folder / "checkpoint-10" / STATE)

    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(folder / "checkpoint-10")

    assert not (tmp_path / "was-run").exists()


def test_the_lock_stays_when_the_checkpoints_are_removed(tmp_path: Path) -> None:
    """Another process can wait for it. With a new file, two processes could own the lock."""
    with exclusive_lock(tmp_path):
        save_checkpoint(tmp_path, 2, {})
        (tmp_path / "file").touch()

        remove_contents(tmp_path)

        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        with pytest.raises(InputError, match="is locked by process"), exclusive_lock(tmp_path):
            pass
