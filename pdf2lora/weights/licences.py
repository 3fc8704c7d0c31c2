"""Licence files of a source model."""

import re
from pathlib import Path

NAME = re.compile(r"licen[cs]e|use_policy|notice", re.IGNORECASE)


def find_licences(source: Path) -> list[str]:
    """Names of the licence and the use policy, as Meta and the Hugging Face hub ship them."""
    return sorted(path.name for path in source.iterdir() if NAME.match(path.name))
