"""Mends what a kill -9 in the middle of one of dvc's own writes can leave in its folder: python -m commands.mend_dvc

dvc writes four things in place: .dvc/tmp/rwlock, dvc.lock, an entry of its run-cache, the state of an experiment that
runs. Ended in such a moment, which takes milliseconds, it later finds a file there that it cannot read and goes no
further. All are made again from what is whole: the rwlock says who is at work, and that is nobody; dvc.lock is built
again from the run-cache, without any stage running; an entry of the run-cache costs one run of its stage. Nothing is
done while a dvc is at work.

An experiment of `dvc exp run --temp` that is killed stays Running in dvc's lists: its file in .dvc/tmp/exps says so and
dvc looks for no process. That file is changed where none works in the experiment's copy. The copy is left alone: where
machines share the file system, a process of another one may be at work there (and would write the file again).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.processes import is_alive

EXPERIMENTS = Path(".dvc/tmp/exps/standalone/run")
SUCCESS, FAILED = 3, 4  # of dvc's TaskStatus: up to SUCCESS, what has a copy counts as running


def main(root: Path = Path(".")) -> None:
    if not (root / ".dvc").is_dir():
        sys.exit(f"error: {root.resolve()} holds no .dvc; run from the folder that holds dvc.yaml")
    for path in damaged(root):
        if at_work := dvc_at_work(root):
            sys.exit(f"error: {path}: cannot be read, and process {at_work[0]} is at work; wait for it or end it")
        print(f"mend_dvc: {path} was half-written and is removed")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file, experiment in killed(root):
        write_json(file, experiment | {"status": FAILED})
        print(
            f"mend_dvc: experiment {experiment['name']} was killed and counts as running no more; "
            f"its copy can be deleted: rm -r {experiment['root_dir']}"
        )


def damaged(root: Path) -> list[Path]:
    rwlock, lock = root / ".dvc/tmp/rwlock", root / "dvc.lock"
    found = [path for path, is_whole in ((rwlock, _is_json), (lock, _is_lock)) if path.exists() and not is_whole(path)]
    for entry in (root / ".dvc/cache/runs").glob("*/*"):
        runs = list(entry.iterdir())
        if not runs or not all(_is_run(run) for run in runs):
            found.append(entry)
    return found + [file.parent for file in (root / EXPERIMENTS).glob("*/*.run") if not _is_json(file)]


def killed(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Files of experiments that are said to run, and what is in them, where no process does."""
    files = {file: json.loads(file.read_text(encoding="utf-8")) for file in (root / EXPERIMENTS).glob("*/*.run")}
    running = [
        (file, experiment)
        for file, experiment in files.items()
        if experiment["status"] <= SUCCESS and Path(experiment["root_dir"]).is_dir()
    ]
    if not running or dvc_at_work(root):  # one that makes its copy is still in the checkout
        return []
    return [(file, experiment) for file, experiment in running if not is_worked_in(Path(experiment["root_dir"]))]


def is_worked_in(folder: Path) -> bool:
    return any(
        process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(folder.resolve()) and is_alive(process)
        for process in psutil.process_iter(["cwd"])
    )


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _is_lock(path: Path) -> bool:
    value = _yaml(path)
    return isinstance(value, dict) and "schema" in value


def _is_run(path: Path) -> bool:
    value = _yaml(path)
    return isinstance(value, dict) and {"cmd", "outs"} <= value.keys()


def _yaml(path: Path) -> object:
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return None


def dvc_at_work(root: Path) -> list[int]:
    """Processes that are dvc and whose current folder is the checkout."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        is_dvc = any(Path(word).name == "dvc" for word in (process.info["cmdline"] or [])[:3])  # python -m dvc, dvc
        if is_dvc and process.info["cwd"] == str(root.resolve()):
            found.append(process.pid)
    return found


if __name__ == "__main__":
    main()
