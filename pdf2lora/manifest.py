"""A folder that says of itself what its files must hold: manifest.json, written last, has the SHA-256 of every one.

What the manifest does not confirm was not written to its end, or a disk or a hand has changed it since. DVC compares
size and time before it reads bytes, so it does not see a bit that flips on the disk.
"""

import json
from pathlib import Path
from typing import Any

from pdf2lora.errors import InputError
from pdf2lora.runtime import file_sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, **more: object) -> None:
    """more: further entries of the JSON object."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    write_json(folder / MANIFEST, more | {"files": hashes})


def read_manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def fault(folder: Path) -> str | None:
    """What is wrong with a folder, in words; None = it holds what was written."""
    if not (folder / MANIFEST).exists():
        return "it was not written to its end"
    try:
        for name, sha256 in read_manifest(folder)["files"].items():
            if file_sha256(folder / name) != sha256:
                return f"its {name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def require_whole(folder: Path, *, made_by: str) -> None:
    """made_by: the stage that wrote the folder.

    Raises:
        InputError: a file is not what the stage wrote.
    """
    if wrong := fault(folder):
        raise InputError(f"{folder}: cannot be used, {wrong}; make it again with: dvc repro --force {made_by}")
