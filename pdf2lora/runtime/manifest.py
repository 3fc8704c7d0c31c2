"""manifest.json: the SHA-256 of every file of a folder. It is written last, so a folder without one is incomplete.

It detects files that a disk or a person changed later. DVC compares size and time before it hashes, so it does not see
a flipped bit.
"""

import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import file_sha256, write_json

MANIFEST = "manifest.json"
LARGE_BYTES = 2**28


def write_manifest(folder: Path) -> None:
    """Writes manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [str(path.relative_to(folder)) for path in files]
    write_json(folder / MANIFEST, {"files": _hash_files(folder, names)})


def find_damage(folder: Path) -> str | None:
    """Describes the first damage in a folder; None if every file has the SHA-256 of the manifest."""
    if not (folder / MANIFEST).exists():
        return f"it is incomplete (no {MANIFEST})"
    try:
        expected: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, sha256 in _hash_files(folder, expected).items():
            if sha256 != expected[name]:
                return f"{name} is corrupt (SHA-256 mismatch)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def require_intact(folder: Path, *, made_by: str) -> None:
    """Checks the output folder of the stage `made_by` against its manifest.

    Raises InputError if a file is missing or corrupt.
    """
    if damage := find_damage(folder):
        raise InputError(f"{folder} cannot be used: {damage}. Make it again with: dvc repro --force {made_by}")


def start_check(folder: Path, *, made_by: str) -> Callable[[], None]:
    """Starts require_intact in a thread. The returned function waits for its end and raises its error.

    The stages hash while they import torch, which takes longer.
    """
    return ThreadPoolExecutor(1).submit(require_intact, folder, made_by=made_by).result


def _hash_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Returns name -> SHA-256.

    Large files are hashed in threads: hashlib releases the GIL, and one core hashes only 1 to 2 GB/s. Small files (of a
    checkpoint) are not: if a new thread gets no memory, Python 3.11 waits forever for its start.
    """
    paths = [folder / name for name in names]
    if sum(path.stat().st_size for path in paths) < LARGE_BYTES:
        return dict(zip(names, map(file_sha256, paths), strict=True))
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(file_sha256, paths), strict=True))
