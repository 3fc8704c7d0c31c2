"""Git LFS pointers: small text files in place of the weights, if the model was cloned without Git LFS."""

from pathlib import Path

from pdf2lora.errors import InputError

START = b"version https://git-lfs.github.com/spec/"


def require_no_pointer(file: Path) -> None:
    """Raises InputError if the file is a Git LFS pointer."""
    with file.open("rb") as stream:
        is_pointer = stream.read(len(START)) == START
    if is_pointer:
        raise InputError(
            f"{file}: this is a Git LFS pointer, not the file. Run git lfs install and git lfs pull in {file.parent}, "
            "or download the file."
        )
