"""Removes DVC's own files that kill -9 left half-written: python -m commands.mend_dvc (`make repro` runs it first)

DVC writes some of its files in place. If it is killed during such a write (milliseconds), it cannot read the file later
and stops with an error. This command removes the damaged file. DVC then makes it again:

- .dvc/tmp/rwlock: the list of running commands. It is removed only if no dvc runs here.
- dvc.lock: made again from the run-cache, without running a stage.
- .dvc/cache/runs: entries of the run-cache. One stage runs again.
- .dvc/tmp/exps: the state of an experiment.

A killed `dvc exp run --temp` stays "Running" in DVC's tables, because DVC reads only a state file. If no process works
in the experiment's temporary copy, this command sets the state to failed. It does not delete the copy, because on a
shared file system a process of another machine may use it.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA, COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from pdf2lora.runtime.arguments import require_no_arguments
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.processes import is_alive

EXPERIMENTS = Path(".dvc/tmp/exps/standalone/run")
SUCCESS, FAILED = 3, 4  # of DVC's TaskStatus; with a state up to SUCCESS and a copy, an experiment counts as running


def main(root: Path = Path(".")) -> None:
    if not (root / ".dvc").is_dir():
        sys.exit(f"error: {root.resolve()} has no folder .dvc. Run from the folder that holds dvc.yaml.")
    for path in damaged_paths(root):
        if pids := running_dvc(root):
            sys.exit(f"error: {path} is damaged and dvc runs as process {pids[0]}. Wait until it ends, or end it.")
        print(f"mend_dvc: removed {path}, which was half-written")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file, experiment in killed_experiments(root):
        write_json(file, experiment | {"status": FAILED})
        print(
            f"mend_dvc: experiment {experiment['name']} was killed; its state is now failed. "
            f"You can delete its copy: rm -r {experiment['root_dir']}"
        )


def damaged_paths(root: Path) -> list[Path]:
    """Files and folders of DVC that are half-written."""
    rwlock, lock = root / ".dvc/tmp/rwlock", root / "dvc.lock"
    damaged = [rwlock] if rwlock.exists() and not _is_json(rwlock) else []
    damaged += [lock] if lock.exists() and not _is_valid(lock, COMPILED_LOCKFILE_SCHEMA) else []
    for entry in (root / ".dvc/cache/runs").glob("*/*"):
        runs = list(entry.iterdir())
        if not runs or not all(_is_valid(run, _require_outs) for run in runs):
            damaged.append(entry)
    return damaged + [file.parent for file in (root / EXPERIMENTS).glob("*/*.run") if not _is_json(file)]


def killed_experiments(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """State file and state of each experiment that counts as running, but has no process."""
    states = {file: json.loads(file.read_text(encoding="utf-8")) for file in (root / EXPERIMENTS).glob("*/*.run")}
    running = [
        (file, state)
        for file, state in states.items()
        if state["status"] <= SUCCESS and Path(state["root_dir"]).is_dir()
    ]
    if not running or running_dvc(root):  # a dvc that runs in the checkout may be making the copy
        return []
    return [(file, state) for file, state in running if not has_process(Path(state["root_dir"]))]


def has_process(folder: Path) -> bool:
    """True if the working directory of a live process is in the folder."""
    return any(
        process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(folder.resolve()) and is_alive(process)
        for process in psutil.process_iter(["cwd"])
    )


def running_dvc(root: Path) -> list[int]:
    """Process ids of dvc commands whose working directory is the checkout."""
    pids = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        is_dvc = any(Path(word).name == "dvc" for word in (process.info["cmdline"] or [])[:3])  # python -m dvc, dvc
        if is_dvc and process.info["cwd"] == str(root.resolve()):
            pids.append(process.pid)
    return pids


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _require_outs(run: Any) -> None:
    if "outs" not in COMPILED_LOCK_FILE_STAGE_SCHEMA(run):
        raise Invalid("no outs")


def _is_valid(path: Path, schema: Callable[[Any], object]) -> bool:
    """Whether the file is YAML that DVC accepts."""
    try:
        schema(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except (YAMLError, UnicodeDecodeError, Invalid):
        return False
    return True


if __name__ == "__main__":
    require_no_arguments(__doc__)
    main()
