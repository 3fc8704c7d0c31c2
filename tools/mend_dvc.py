"""Mends what a kill -9 in the middle of one of dvc's own writes can leave in its folder: python -m tools.mend_dvc

dvc writes three things in place: .dvc/tmp/rwlock, dvc.lock, an entry of its run-cache. Ended in such a moment, which
takes milliseconds, it later finds a file there that it cannot read and goes no further. All three are made again from
what is whole: the rwlock says who is at work, and that is nobody; dvc.lock is built again from the run-cache, without
any stage running; an entry of the run-cache costs one run of its stage. Nothing is done while a dvc is at work.
"""

import json
import shutil
import sys
from pathlib import Path

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def main(root: Path = Path(".")) -> None:
    if not (root / ".dvc").is_dir():
        sys.exit(f"error: {root.resolve()} holds no .dvc; run from the folder that holds dvc.yaml")
    for path in damaged(root):
        if at_work := dvc_at_work(root):
            sys.exit(f"error: {path}: cannot be read, and process {at_work[0]} is at work; wait for it or end it")
        print(f"mend_dvc: {path} was half-written and is removed")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damaged(root: Path) -> list[Path]:
    rwlock, lock = root / ".dvc/tmp/rwlock", root / "dvc.lock"
    found = [path for path, is_whole in ((rwlock, _is_json), (lock, _is_lock)) if path.exists() and not is_whole(path)]
    for entry in (root / ".dvc/cache/runs").glob("*/*"):
        runs = list(entry.iterdir())
        if not runs or not all(_is_run(run) for run in runs):
            found.append(entry)
    return found


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
