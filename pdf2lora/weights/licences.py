"""Licence files of a source model."""

import re
from pathlib import Path

NAME = re.compile(r"licen[cs]e|use_policy|notice", re.IGNORECASE)


def find_licences(source: Path) -> list[str]:
    """Names of the files with the licence and the use policy, as Meta and the Hugging Face hub ship them."""
    return sorted(path.name for path in source.iterdir() if path.is_file() and NAME.match(path.name))
