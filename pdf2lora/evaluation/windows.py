"""Texts as evaluation windows, with the sizes by which their nats are divided."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdf2lora.params import Params
from pdf2lora.tokens import Encoder, Window


@dataclass(frozen=True)
class TextSize:
    """The size of one text in three units."""

    tokens: int
    bytes: int  # UTF-8
    words: int  # separated by white space


def text_windows(texts: Sequence[str], encoder: Encoder, params: Params) -> tuple[list[TextSize], list[Window]]:
    """The size of each text, and windows that score each of its tokens once.

    A window's `document` is the position of its text in `texts`.
    """
    encoded = encoder.encode(texts)
    sizes = [
        TextSize(tokens=len(tokens), bytes=len(text.encode()), words=len(text.split()))
        for text, tokens in zip(texts, encoded, strict=True)
    ]
    return sizes, encoder.windows(encoded, seq_length=params.compute.seq_length, stride=params.evaluate.stride)
