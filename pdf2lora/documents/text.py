"""The words and the hash of a text."""

import hashlib
import re


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def words(text: str) -> list[str]:
    """Returns the words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
