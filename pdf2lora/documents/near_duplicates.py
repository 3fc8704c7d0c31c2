"""Groups of near-duplicate texts (MinHash)."""

from collections.abc import Sequence

from tqdm import tqdm

from pdf2lora.documents.text import words

NEAR_DUPLICATE_WORDS = 5  # a shingle of MinHash


def near_duplicate_groups(texts: Sequence[str], similarity: float) -> list[list[int]]:
    """Groups of positions whose texts share 5-word shingles to a Jaccard similarity of `similarity` or more.

    MinHash with locality-sensitive hashing (Broder 1997; datasketch), its 128 permutations seeded: near-linear in the
    number of texts, and the same groups whatever their order. Similarity carries over: a ~ b and b ~ c put a, b, c in
    one group.
    """
    from datasketch import MinHash, MinHashLSH  # imports numpy and scipy: only split pays for it

    index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=128)  # finds candidates; jaccard decides
    sketches = []
    for number, text in enumerate(tqdm(texts, desc="split", unit="document", disable=None)):
        sketch = MinHash(num_perm=128, seed=1)
        tokens = words(text)
        shingles = {" ".join(tokens[i : i + NEAR_DUPLICATE_WORDS]) for i in range(max(1, len(tokens) - 4))}
        sketch.update_batch([shingle.encode() for shingle in shingles])
        index.insert(number, sketch)
        sketches.append(sketch)

    group_of = list(range(len(texts)))

    def root(number: int) -> int:
        while group_of[number] != number:
            number = group_of[number]
        return number

    for number, sketch in enumerate(sketches):
        for other in index.query(sketch):
            if sketch.jaccard(sketches[other]) >= similarity:
                low, high = sorted((root(number), root(other)))
                group_of[high] = low
    groups: dict[int, list[int]] = {}
    for number in range(len(texts)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())
