"""Git LFS pointers in place of the weights, if the model was cloned without Git LFS."""

from pathlib import Path

from pdf2lora.errors import InputError
from pdf2lora.runtime.files import is_lfs_pointer


def require_no_pointer(file: Path) -> None:
    """Raises InputError if the file is a Git LFS pointer."""
    if is_lfs_pointer(file):
        raise InputError(
            f"{file}: this is a Git LFS pointer, not the file. Run git lfs install and git lfs pull in {file.parent}, "
            "or download the file."
        )
