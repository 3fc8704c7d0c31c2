"""What every stage needs of the machine: scratch folders, fingerprints, locks, whole files or none."""

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pdf2lora.errors import InputError


def project_root() -> Path:
    """The main checkout: DVC says where it is, also to a stage that runs in a temporary copy (`dvc exp run --temp`)."""
    return Path(os.environ.get("DVC_ROOT", "."))


def fingerprint(*ingredients: object) -> str:
    """16 hex digits that change when a value changes, or the bytes of a Path (a file, or a folder's files)."""
    digest = hashlib.sha256()
    for ingredient in ingredients:
        if isinstance(ingredient, Path):
            files = (
                sorted(path for path in ingredient.rglob("*") if path.is_file() and path.suffix != ".pyc")
                if ingredient.is_dir()
                else [ingredient]
            )
            for file in files:
                digest.update(os.fsencode(file.relative_to(ingredient)) + f" {file_sha256(file)}\n".encode())
        else:
            digest.update(f"{ingredient!r}\n".encode())
    return digest.hexdigest()[:16]


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def scratch_folder(stage: str, key: str) -> Path:
    """`.scratch/<stage>/<key>`: what a stage may lose and make again; in neither git nor DVC's cache."""
    folder = project_root() / ".scratch" / stage / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def sole_owner(folder: Path, *, patience_s: float = 0) -> Iterator[None]:
    """Keeps a second process out of a scratch folder; the kernel frees it when the first ends, however it ends.

    patience_s: how long to wait for the first to end.

    Raises:
        InputError: another process holds the folder.
    """
    import fcntl

    until = time.monotonic() + patience_s
    told = False
    with (folder / "lock").open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "?"
            if time.monotonic() >= until:
                raise InputError(
                    f"{folder}: process {owner} is already at work on these very settings and data; "
                    "wait for it or end it"
                )
            if not told:
                print(f"{folder.name}: waits for process {owner}, which is at work on the same, to end", flush=True)
                told = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Gives a path to write to, and puts that file in place of `file` once the block has ended without an error.

    The path is this process's own: two that write the same file do not write into each other's. What killed ones left
    behind is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(file)
    try:
        with _names_file(file):
            yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Like whole_file, for an empty folder to fill."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _names_file(folder):
            yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.name.split(".")[-2]
        if not pid.isdigit() or not _is_at_work(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_at_work(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return is_alive(psutil.Process(pid))
    return False


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it has ended, and where an orphan's new parent is slow to ask, it exists for seconds more."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def _names_file(path: Path) -> Iterator[None]:
    """A full disk or a limit is reported by the system without the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_json(file: Path, value: object) -> None:
    with whole_file(file) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
