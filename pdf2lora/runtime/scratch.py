""".scratch/: caches and checkpoints, in a folder for each fingerprint of their inputs. Not in git or DVC's cache."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pdf2lora.runtime.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]  # of the code


def project_root() -> Path:
    """The main checkout. DVC sets DVC_ROOT, also for a stage in a temporary copy (`dvc exp run --temp`)."""
    return Path(os.environ.get("DVC_ROOT", "."))


def fingerprint(*inputs: object) -> str:
    """16 hex digits that change with every input: with the bytes of a file or folder (a Path), or with the repr."""
    digest = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Path):
            for file in _files_of(value):
                digest.update(os.fsencode(file.relative_to(value)) + f" {file_sha256(file)}\n".encode())
        else:
            digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()[:16]


def scratch_folder(stage: str, key: str) -> Path:
    """Makes the folder .scratch/<stage>/<key>. Its content can be deleted: the stage can make it again."""
    folder = project_root() / ".scratch" / stage / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_code(stage: str) -> list[Path]:
    """The code dependencies of a stage in dvc.yaml: files and folders."""
    return [ROOT / dep for dep in pipeline_stages()[stage]["deps"] if dep.startswith(("pdf2lora/", "stages/"))]


@cache
def pipeline_stages() -> dict[str, Any]:
    """The stages in dvc.yaml."""
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return stages


def _files_of(path: Path) -> list[Path]:
    """The file, or all files of the folder in sorted order, without compiled Python files."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")
