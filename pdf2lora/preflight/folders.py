"""The folders that params.yaml names."""

import os
from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.params import Params
from pdf2lora.paths import CORPORA, REPLAY, SOURCE_MODELS


def require_folders(params: Params) -> None:
    """Raises InputError if a folder that params.yaml names is missing, or has a file that DVC cannot store."""
    _require_folder("corpus", CORPORA / params.corpus, "Put your PDFs there")
    _require_folder("model", SOURCE_MODELS / params.model, "Put the source model there")
    if params.train.replay != "none":
        _require_folder("train.replay", REPLAY / params.train.replay, "Put the text there")


def _require_folder(key: str, folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        existing = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "none"
        raise InputError(
            f"{key}: '{folder.name}' must be a folder of {folder.parent} (existing ones: {existing}). "
            f"{remedy}, or choose another folder with -S {key}=..."
        )
    for path in folder.rglob("*"):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            printable = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise InputError(
                f"{key}: the name of '{printable}' is not UTF-8, and DVC cannot store it. Rename the file."
            ) from None
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{key}: the link '{path}' leads to no file, and DVC cannot store it. Remove the link, or put the file "
                "there."
            )
