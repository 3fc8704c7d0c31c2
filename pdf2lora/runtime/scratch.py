"""Scratch folders under a fingerprint."""

import hashlib
import os
from pathlib import Path

from ruamel.yaml import YAML

from pdf2lora.runtime.files import file_sha256


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


def scratch_folder(stage: str, key: str) -> Path:
    """`.scratch/<stage>/<key>`: what a stage may lose and make again; in neither git nor DVC's cache."""
    folder = project_root() / ".scratch" / stage / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_code(stage: str) -> list[Path]:
    """The files and folders of code on which a stage depends, as dvc.yaml lists them."""
    root = Path(__file__).resolve().parents[2]
    pipeline = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))
    return [root / dep for dep in pipeline["stages"][stage]["deps"] if dep.startswith(("pdf2lora/", "stages/"))]
