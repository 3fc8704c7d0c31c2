"""The inputs of a stage that is started by hand, before the stages that write them."""

from pathlib import Path

from pdf2lora.errors import InputError


def require_inputs(*paths: Path) -> None:
    """
    Raises:
        InputError: a file or folder does not exist.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist. An earlier stage writes it: dvc repro runs the stages in order.")
