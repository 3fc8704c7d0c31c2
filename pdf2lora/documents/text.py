"""Words and hashes of a text."""

import hashlib
import re


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
