"""Checkpoints: the state of a training after a step, written by the main process.

A checkpoint does not depend on the number of processes: dropout masks and data order follow from the seed and the step.
Its manifest is written last. Training resumes from the newest checkpoint whose files match their manifest.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from pdf2lora.runtime.manifest import find_damage, write_manifest

STATE = "state.pt"
NUM_KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes checkpoint-<step> and removes all but the newest NUM_KEPT.

    state: numbers, texts, lists, dicts and tensors.
    """
    checkpoint = folder / f"checkpoint-{step}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    torch.save(state, checkpoint / STATE)
    write_manifest(checkpoint)
    for old in _by_step(folder)[:-NUM_KEPT]:
        shutil.rmtree(old)


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state that save_checkpoint wrote, with its tensors on the CPU."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return state


def latest_valid(folder: Path, *, remove_corrupt: bool) -> Path | None:
    """The newest intact checkpoint of the folder; None if there is none.

    remove_corrupt: removes corrupt ones with one line each. Only for the process that writes checkpoints: one that is
    still being written looks corrupt.
    """
    for checkpoint in reversed(_by_step(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if not remove_corrupt:
            continue
        print(f"train: {checkpoint.name} is corrupt ({damage}) and is removed", flush=True)
        shutil.rmtree(checkpoint)
    return None


def remove_contents(folder: Path) -> None:
    """Removes everything but the file `lock`, because another process may wait for it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=step_of)
