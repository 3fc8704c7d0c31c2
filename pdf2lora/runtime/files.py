"""Files and folders that are written completely or not at all."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pdf2lora.runtime.processes import is_alive


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
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
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Like atomic_write, for an empty folder to fill."""
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
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
