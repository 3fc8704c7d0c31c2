"""Hashes, and atomic writes of files and folders."""

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


def is_lfs_pointer(file: Path) -> bool:
    """True for a Git LFS pointer. Without Git LFS, a clone has this small text in place of the file."""
    start = b"version https://git-lfs.github.com/spec/"
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It replaces `file` when the block ends without an exception.

    The name of the temporary file contains the process id, so that two processes never write to the same file.
    Temporary files of dead processes are removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(file)
    try:
        with _add_filename(file):
            yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Like atomic_write, for a folder: yields an empty temporary folder, which replaces `folder`.

    If `folder` is a link to a folder (on a larger disk), that folder is replaced.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    partial = _partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _add_filename(folder):
            yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(file: Path, value: object) -> None:
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _partial_path(path: Path) -> Path:
    """The temporary path of this process. Removes those of dead processes."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = partial.name.split(".")[-2]
        if not pid.isdigit() or not _is_running(int(pid)):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return is_alive(psutil.Process(pid))
    return False


@contextmanager
def _add_filename(path: Path) -> Iterator[None]:
    """Adds the path to an OSError without a path, such as a failed write to an open file (full disk, size limit)."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
