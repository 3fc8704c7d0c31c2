"""The merges of a byte-pair encoding, recovered from the ranks of its tokens."""

import math
from collections.abc import Mapping
from typing import AnyStr


def last_merge(token: AnyStr, ranks: Mapping[AnyStr, float]) -> tuple[AnyStr, AnyStr] | None:
    """The two parts that BPE joins last when it makes `token` from characters (or bytes); None if it cannot make it.

    BPE repeatedly joins the leftmost neighbours whose union has the lowest rank. In a longer text it joins the same
    parts in the same order, as long as no union crosses an edge of `token`. So only this pair can make the token, and a
    table of these pairs is equivalent to the ranks.
    """
    parts = [token[n : n + 1] for n in range(len(token))]
    union_ranks = [ranks.get(token[n : n + 2], math.inf) for n in range(len(token) - 1)]  # of parts n and n + 1
    while len(parts) > 2:
        lowest = min(union_ranks)
        if lowest == math.inf:
            return None
        at = union_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del union_ranks[at]
        for n in range(max(at - 1, 0), min(at + 1, len(union_ranks))):
            union_ranks[n] = ranks.get(parts[n] + parts[n + 1], math.inf)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def merges_of(ranks: Mapping[AnyStr, float]) -> list[tuple[AnyStr, AnyStr]]:
    """The pair of each token that BPE can make, in the order of the ranks."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    return [pair for token in by_rank if (pair := last_merge(token, ranks)) is not None]
