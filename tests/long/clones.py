"""Temporary clones of this checkout that run the pipeline, and the hashes in their dvc.lock."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "torture"
NUM_PDFS = 8
SETTINGS = {  # 1.3 epochs; logging, validation and checkpoints rarely happen in the same step
    "corpus": CORPUS,
    "extract.max_pages": 1,
    "find_batch.max": 2,
    "find_batch.steps": 2,
    "compute.seq_length": 64,
    "train.effective_batch": 4,
    "train.num_train_epochs": 1.3,
    "train.logging_steps": 3,
    "train.eval_steps": 7,
    "train.save_steps": 4,
    "evaluate.stride": 64,
    "split.validation_fraction": 0.15,
}
TIMEOUT_S = 900.0  # long, because a busy machine can take many times longer


class Failed(Exception):
    """A program ended with an error, or a guarantee does not hold."""


def make_clone(clone: Path, *, short: bool = True, settings: dict[str, Any] | None = None) -> None:
    """Clones HEAD, changes params.yaml and commits.

    short: a corpus of a few demo PDFs and a training of seconds (SETTINGS).
    """
    # --no-local: one pack instead of thousands of objects, because the clone is copied several times
    run(["git", "clone", "--quiet", "--no-local", str(ROOT), str(clone)], clone.parent)
    if short:
        (clone / "dvc.lock").unlink()  # it is the demo's, and each dvc command takes a second to parse it
        demo = sorted((clone / "data/pdfs/demo").rglob("*.pdf"), key=lambda path: (path.stat().st_size, path.name))
        corpus = clone / "data/pdfs" / CORPUS
        corpus.mkdir()
        for pdf in demo[:NUM_PDFS]:
            shutil.copy(pdf, corpus)
        run(
            ["dvc", "add", "--quiet", str(corpus)], clone
        )  # git ignores the corpus; without this an experiment's copy would not have it
    yaml = YAML()
    params = yaml.load(clone / "params.yaml")
    for key, value in ((SETTINGS if short else {}) | (settings or {})).items():
        *sections, name = key.split(".")
        section = params
        for part in sections:
            section = section[part]
        section[name] = value
    yaml.dump(params, clone / "params.yaml")
    run(["git", "add", "--all"], clone)
    run(["git", "commit", "--quiet", "--allow-empty", "--message", "Change settings for a test"], clone)


def environment(num_threads: int = 1) -> dict[str, str]:
    """Environment with this Python's programs first, a git identity, num_threads threads, without variables of dvc."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    names = {f"GIT_{who}_{what}": "clone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | names | {"PATH": path, "OMP_NUM_THREADS": str(num_threads), "DVC_NO_ANALYTICS": "1"}


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Starts a command in the folder. Its output goes to `folder`.txt."""
    with folder.with_suffix(".txt").open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=output, stderr=output, start_new_session=True
        )


def run(command: list[str], folder: Path, *, num_threads: int = 1, timeout_s: float = TIMEOUT_S) -> str:
    """Runs a command in the folder. Returns its stdout.

    Raises:
        Failed: the exit status is not 0.
    """
    done = subprocess.run(
        command, cwd=folder, env=environment(num_threads), capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stdout[-1500:]} {done.stderr[-1500:]}")
    return done.stdout


def outs(lock: Path) -> dict[str, str]:
    """Returns path -> md5 for all outputs in a dvc.lock."""
    stages = YAML(typ="safe", pure=True).load(lock)["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}
