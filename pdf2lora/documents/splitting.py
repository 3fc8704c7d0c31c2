"""The split of documents into train, validation and test."""

import hashlib
from collections.abc import Sequence

from pdf2lora.documents.near_duplicates import near_duplicate_groups
from pdf2lora.documents.records import SIDES, Document
from pdf2lora.documents.text import text_sha256


def split(
    documents: Sequence[Document], *, test_fraction: float, validation_fraction: float, similarity: float, seed: int
) -> dict[str, list[Document]]:
    """Train, validation and test documents; a group of near-duplicates is wholly on one side.

    Each group draws a number from a seeded hash of its texts. In the order of these numbers the test side is filled
    first, then validation, each to its share of the documents (at least one), and train takes the rest. So neither
    the names nor the order of the files matter, and a document that is added moves one across each boundary at the
    most.

    Returns:
        side -> documents in the order of their draws.

    Raises:
        ValueError: there are fewer groups than sides to fill.
    """
    hashes = [text_sha256(document.text) for document in documents]
    groups = near_duplicate_groups([document.text for document in documents], similarity)
    sides = [side for side in SIDES if side != "validation" or validation_fraction > 0]
    if len(groups) < len(sides):
        raise ValueError(f"{len(groups)} groups of documents cannot fill {', '.join(sides)}")

    def draw(group: list[int]) -> str:
        return hashlib.sha256(f"{seed} {min(hashes[number] for number in group)}".encode()).hexdigest()

    waiting = sorted(groups, key=draw)
    filled: dict[str, list[Document]] = {side: [] for side in SIDES}
    test_wanted = max(1, round(test_fraction * len(documents)))
    up_to_validation = round((test_fraction + validation_fraction) * len(documents))
    validation_wanted = max(1, up_to_validation - test_wanted) if validation_fraction else 0
    for side, wanted in (("test", test_wanted), ("validation", validation_wanted)):
        while len(filled[side]) < wanted and len(waiting) > 1 + (side == "test" and validation_fraction > 0):
            filled[side] += [documents[number] for number in sorted(waiting.pop(0), key=hashes.__getitem__)]
    filled["train"] = [documents[number] for group in waiting for number in sorted(group, key=hashes.__getitem__)]
    return filled
