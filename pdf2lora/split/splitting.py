"""The split of documents into train, validation and test."""

import hashlib
from collections.abc import Sequence

from pdf2lora.documents.records import SPLITS
from pdf2lora.errors import InputError


def group_numbers(documents: Sequence[int], groups: Sequence[Sequence[int]]) -> list[int]:
    """Returns the number of the group of each document. Groups are numbered in the order of their first documents."""
    group_of = {document: number for number, group in enumerate(groups) for document in group}
    order = {number: place for place, number in enumerate(dict.fromkeys(group_of[document] for document in documents))}
    return [order[group_of[document]] for document in documents]


def split(
    hashes: Sequence[str],
    groups: Sequence[Sequence[int]],
    *,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
) -> dict[str, list[int]]:
    """Returns split -> numbers of documents. All documents of a group are in the same split.

    hashes: of the text of each document. groups: the numbers of near-duplicates.

    The groups are sorted by a seeded hash of their texts. The first ones fill test and the next ones fill validation,
    up to their fraction of the documents (at least one group). Train gets the rest, and the groups that are larger than
    the fraction. So the names and the order of the files do not matter, and without near-duplicates an additional
    document moves at most one other document across each boundary.

    Raises InputError if there are fewer groups than splits.
    """
    names = [name for name in SPLITS if name != "validation" or validation_fraction > 0]
    if len(groups) < len(names):
        remedy = " or set split.validation_fraction to 0" if validation_fraction > 0 and len(groups) > 1 else ""
        raise InputError(
            f"split: the corpus has {len(hashes)} usable documents in {len(groups)} groups of near-duplicates; "
            f"{', '.join(names)} need at least {len(names)} groups. Add PDFs{remedy}."
        )

    def seeded_hash(group: Sequence[int]) -> str:
        return hashlib.sha256(f"{seed} {min(hashes[number] for number in group)}".encode()).hexdigest()

    remaining = sorted(groups, key=seeded_hash)
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    num_test = max(1, round(test_fraction * len(hashes)))
    num_held_out = round((test_fraction + validation_fraction) * len(hashes))
    num_validation = max(1, num_held_out - num_test) if validation_fraction else 0
    for name, size in (("test", num_test), ("validation", num_validation)):
        min_remaining = 2 if name == "test" and validation_fraction > 0 else 1
        while len(splits[name]) < size and len(remaining) > min_remaining:
            group = next((group for group in remaining if len(group) <= size), None)
            if group is None:
                if splits[name]:
                    break
                group = min(remaining, key=len)
            remaining.remove(group)
            splits[name] += sorted(group, key=hashes.__getitem__)
    splits["train"] = [number for group in remaining for number in sorted(group, key=hashes.__getitem__)]
    return splits
