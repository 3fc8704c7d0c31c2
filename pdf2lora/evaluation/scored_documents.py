"""The documents that evaluate and export score."""

import json
from collections.abc import Iterator

from pdf2lora.documents.records import Document, read_documents
from pdf2lora.paths import SPLIT_DOCUMENTS, TEST_GROUPS, TOKENS
from pdf2lora.token_files import TokenFile
from pdf2lora.tokens import Tokens

TEST = SPLIT_DOCUMENTS / "test.jsonl"


def read_test() -> Iterator[tuple[Document, Tokens, int]]:
    """Yields each test document, its tokens and the number of its group of near-duplicates."""
    groups = json.loads(TEST_GROUPS.read_bytes())
    return zip(read_documents(TEST), TokenFile.open(TOKENS, "test").documents(), groups, strict=True)
