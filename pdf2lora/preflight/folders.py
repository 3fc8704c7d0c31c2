"""The folders that params.yaml names."""

from pathlib import Path

from pdf2lora.errors import InputError

CORPORA = Path("data/pdfs")
SOURCES = Path("models/source")  # base models as downloaded


def require_folder(key: str, folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "none"
        raise InputError(
            f"{key}: '{folder.name}' must be a folder of {folder.parent} (there: {known}); "
            f"{remedy}, or choose another with -S {key}=..."
        )
