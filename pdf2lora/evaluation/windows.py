"""Documents -> evaluation windows and the sizes by which their nats are divided."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdf2lora.documents.records import Document
from pdf2lora.params import Params
from pdf2lora.tokens import Encoder, Window


@dataclass(frozen=True)
class TextSize:
    """What one document's nats are divided by."""

    tokens: int
    bytes: int  # UTF-8
    words: int


def document_windows(
    documents: Sequence[Document], encoder: Encoder, params: Params
) -> tuple[list[TextSize], list[Window]]:
    """What the nats of each document are divided by, and the windows that score all of its tokens."""
    encoded = encoder.encode([document.text for document in documents])
    sizes = [
        TextSize(tokens=len(tokens), bytes=len(document.text.encode()), words=len(document.text.split()))
        for document, tokens in zip(documents, encoded, strict=True)
    ]
    looks = encoder.windows(encoded, seq_length=params.compute.seq_length, stride=params.evaluate.stride)
    return sizes, looks
