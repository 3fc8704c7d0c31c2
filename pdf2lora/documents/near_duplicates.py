"""Groups of near-duplicate texts (MinHash)."""

from collections.abc import Sequence

from tqdm import tqdm

from pdf2lora.documents.text import words

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128


def near_duplicate_groups(texts: Sequence[str], similarity: float) -> list[list[int]]:
    """Returns groups of positions in `texts`. Two texts are near-duplicates if their 5-word shingles are alike.

    similarity: the smallest Jaccard similarity of the shingles of near-duplicates.

    MinHash with locality-sensitive hashing (Broder 1997; datasketch). The time is nearly linear in the number of
    texts. The permutations are seeded, so the groups do not depend on the order of the texts. Near-duplication is
    transitive here: if a ~ b and b ~ c, then a, b and c are one group.
    """
    from datasketch import MinHash, MinHashLSH  # here, because it imports numpy and scipy

    index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=NUM_PERMUTATIONS)  # finds candidates
    sketches = []
    for number, text in enumerate(tqdm(texts, desc="split", unit="document", disable=None)):
        sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in _shingles(text)])
        index.insert(number, sketch)
        sketches.append(sketch)

    parents = list(range(len(texts)))  # a union-find forest

    def root(number: int) -> int:
        while parents[number] != number:
            number = parents[number]
        return number

    for number, sketch in enumerate(sketches):
        for candidate in index.query(sketch):
            if sketch.jaccard(sketches[candidate]) >= similarity:
                low, high = sorted((root(number), root(candidate)))
                parents[high] = low
    groups: dict[int, list[int]] = {}
    for number in range(len(texts)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def _shingles(text: str) -> set[str]:
    tokens = words(text)
    num_shingles = max(1, len(tokens) - SHINGLE_WORDS + 1)
    return {" ".join(tokens[start : start + SHINGLE_WORDS]) for start in range(num_shingles)}
