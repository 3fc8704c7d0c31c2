"""Test documents as evaluation windows, with the sizes by which their nats are divided."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdf2lora.documents.records import Document
from pdf2lora.params import Params
from pdf2lora.tokens import Encoder, Window


@dataclass(frozen=True)
class TextSize:
    """The size of one document's text in three units."""

    tokens: int
    bytes: int  # UTF-8
    words: int  # separated by white space


def document_windows(
    documents: Sequence[Document], encoder: Encoder, params: Params
) -> tuple[list[TextSize], list[Window]]:
    """The size of each document, and windows that score each of its tokens once.

    A window's `document` is the position of its document in `documents`.
    """
    encoded = encoder.encode([document.text for document in documents])
    sizes = [
        TextSize(tokens=len(tokens), bytes=len(document.text.encode()), words=len(document.text.split()))
        for document, tokens in zip(documents, encoded, strict=True)
    ]
    return sizes, encoder.windows(encoded, seq_length=params.compute.seq_length, stride=params.evaluate.stride)
