"""A folder that says of itself what its files must hold: manifest.json, written last, has the SHA-256 of every one.

What the manifest does not confirm was not written to its end, or a disk or a hand has changed it since. DVC compares
size and time before it reads bytes, so it does not see a bit that flips on the disk.
"""

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import file_sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, **more: object) -> None:
    """more: further entries of the JSON object."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [str(path.relative_to(folder)) for path in files]
    write_json(folder / MANIFEST, more | {"files": _hashes(folder, names)})


def read_manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def fault(folder: Path) -> str | None:
    """What is wrong with a folder, in words; None = it holds what was written."""
    if not (folder / MANIFEST).exists():
        return "it was not written to its end"
    try:
        written: dict[str, str] = read_manifest(folder)["files"]
        for name, sha256 in _hashes(folder, written).items():
            if sha256 != written[name]:
                return f"its {name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def _hashes(folder: Path, names: Collection[str]) -> dict[str, str]:
    """SHA-256 of each file, several at a time: hashlib lets other threads run, and one core reads 1 to 2 GB/s."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


def require_intact(folder: Path, *, made_by: str) -> None:
    """made_by: the stage that wrote the folder.

    Raises:
        InputError: a file is not what the stage wrote.
    """
    if wrong := fault(folder):
        raise InputError(f"{folder}: cannot be used, {wrong}; make it again with: dvc repro --force {made_by}")
