"""The sizes of texts. The metrics divide nats by them."""

from collections.abc import Iterable
from dataclasses import dataclass

from pdf2lora.tokens import Tokens


@dataclass(frozen=True)
class TextSize:
    """The size of one text in three units."""

    tokens: int
    bytes: int  # UTF-8
    words: int  # separated by white space


def text_sizes(texts: Iterable[str], encoded: Iterable[Tokens]) -> list[TextSize]:
    """The size of each text. encoded: their tokens."""
    return [
        TextSize(tokens=len(tokens), bytes=len(text.encode()), words=len(text.split()))
        for text, tokens in zip(texts, encoded, strict=True)
    ]
