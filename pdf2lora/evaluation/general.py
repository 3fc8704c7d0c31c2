"""The general text that ships with the project: its perplexity shows what the adapted model forgot."""

from pathlib import Path

from pdf2lora.errors import InputError

GENERAL = Path("data/general")


def read_general(folder: Path = GENERAL) -> list[str]:
    """The .txt files of the folder in the order of their names; each file is one document.

    Raises InputError if the folder has no .txt file.
    """
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
    if not texts:
        raise InputError(f"{folder} has no .txt file, but it is part of the project. Run: git checkout {folder}")
    return texts
