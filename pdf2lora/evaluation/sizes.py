"""The sizes of texts. The metrics divide nats by them."""

from dataclasses import dataclass

from pdf2lora.tokens import Tokens


@dataclass(frozen=True)
class TextSize:
    """The size of one text in three units."""

    tokens: int
    bytes: int  # UTF-8
    words: int  # separated by white space


def text_size(text: str, tokens: Tokens) -> TextSize:
    """tokens: those of the text."""
    return TextSize(tokens=len(tokens), bytes=len(text.encode()), words=len(text.split()))
