"""Mutated PDFs and source models, thousands of them, read as the pipeline reads them: python -m tests.long.fuzz

    --pdfs 3000 --source-models 1000 --seed 1     (make fuzz)

PDFs: none may hang past its time, swell past its memory, end the parent or be left out of the account. Source models:
each is converted or refused with an InputError, in the memory of an undamaged one and some.
"""

import argparse
import random
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from pdf2lora.documents.extraction import extract
from pdf2lora.documents.worker import MAX_CHARACTERS
from pdf2lora.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PDFS = ROOT / "data/pdfs/demo"
SOURCE_MODEL = ROOT / "models/source/demo"
TIMEOUT_S = 3.0
MEMORY_GIB = 1.0
SETTINGS = {"engines": ["pypdf2", "pdfium"], "max_pages": 30, "clean": True, "min_characters": 300}
NUMBERS = [b"0", b"-1", b"1", b"65536", b"2147483648", b"99999999999999999999"]
NAMES = [
    b"/FlateDecode",
    b"/LZWDecode",
    b"/ASCII85Decode",
    b"/Type /Catalog",
    b"/Length",
    b"/Kids",
    b"/Parent",
    b"stream",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdfs", type=int, default=3000)
    parser.add_argument("--source-models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="fuzz-") as folder:
        print(fuzz_pdfs(Path(folder) / "pdfs", arguments.pdfs, arguments.seed))
        print(fuzz_source_models(Path(folder) / "models", arguments.source_models, arguments.seed))


def fuzz_pdfs(folder: Path, number: int, seed: int, *, num_workers: int | None = None) -> str:
    """Gives what became of the files, in words.

    Raises:
        AssertionError: a promise is broken; the file's name is in the text.
    """
    folder.mkdir(parents=True)
    originals = [path.read_bytes() for path in sorted(PDFS.rglob("*.pdf"))]
    files = []
    for n in range(number):
        files.append(folder / f"{n:05}.pdf")
        files[-1].write_bytes(mutated(originals, random.Random(f"{seed} {n}")))
    started = time.monotonic()
    outcomes: Counter[str] = Counter()
    accounted, last, slowest, largest_gib = [], started, 0.0, 0.0
    for file, extraction in extract(
        files, timeout_s=TIMEOUT_S, memory_gib=MEMORY_GIB, num_workers=num_workers, **SETTINGS
    ):
        accounted.append(file)
        outcomes[str(extraction.reason or "kept")] += 1
        slowest, last = max(slowest, time.monotonic() - last), time.monotonic()
        largest_gib = max([largest_gib, *(gib for gib in worker_gib())])
        assert (extraction.reason is None) == (len(extraction.text) >= 300), file
        assert len(extraction.text) <= 20 * MAX_CHARACTERS, file
    own_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert accounted == files, "files are missing in the account"
    assert largest_gib <= MEMORY_GIB, f"a worker took {largest_gib:.2f} GiB"
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return (
        f"fuzz: {number} PDFs in {time.monotonic() - started:.0f} s: {said}; the longest wait {slowest:.1f} s, "
        f"the largest worker {largest_gib:.2f} GiB, the parent {own_gib:.2f} GiB"
    )


def worker_gib() -> Iterator[float]:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            yield child.memory_info().rss / 2**30


def mutated(originals: list[bytes], rng: random.Random) -> bytes:
    content = bytearray(rng.choice(originals))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        rng.choice(MUTATIONS)(content, originals, rng)
    return bytes(content)


def flip(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice([1, 8, 64])):
        content[rng.randrange(len(content))] = rng.randrange(256)


def cut(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    del content[rng.randrange(1, len(content)) :]
    content += b"\0"


def take_out(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice([1, 30, 1000, 20000])]
    content += b"\n"


def repeat(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.choice([10, 1000])] * rng.choice([1, 5])


def splice(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    other = rng.choice(originals)
    content[rng.randrange(len(content)) :] = other[rng.randrange(len(other)) :] or b"\n"


def other_number(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    """Lengths, counts, references (so circles too), offsets."""
    found = list(re.finditer(rb"\b\d+\b", bytes(content)))
    if found:
        chosen = rng.choice(found)
        content[chosen.start() : chosen.end()] = rng.choice([*NUMBERS, *(match[0] for match in found[:200])])


def other_name(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    found = list(re.finditer(rb"/[A-Za-z]+", bytes(content)))
    if found:
        chosen = rng.choice(found)
        content[chosen.start() : chosen.end()] = rng.choice([*NAMES, *(match[0] for match in found[:100])])


MUTATIONS: list[Callable[[bytearray, list[bytes], random.Random], None]] = [
    flip,
    cut,
    take_out,
    repeat,
    splice,
    other_number,
    other_number,
    other_name,
]


def fuzz_source_models(folder: Path, number: int, seed: int, *, source: Path = SOURCE_MODEL) -> str:
    """Gives the outcomes of the source models in words.

    Raises:
        AssertionError: one took more memory than twice the undamaged one and 512 MiB.
        Exception: what `convert` raised that is no InputError.
    """
    from pdf2lora.weights.conversion import convert

    names = sorted(path.name for path in source.iterdir() if path.name != "training.json")
    whole = {name: (source / name).read_bytes() for name in names}
    outcomes: Counter[str] = Counter()
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (512 << 10) + 2 * sum(map(len, whole.values())) // 1024
    for n in range(number):
        rng = random.Random(f"{seed} {n}")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        (folder / "in").mkdir()
        damaged = rng.choice(names)
        for name, content in whole.items():
            changed = mutated([content], rng) if name == damaged else content
            (folder / "in" / name).write_bytes(changed)
        try:
            convert(folder / "in", folder / "out", llama_version="3.2", max_shard_gib=2.0)
            outcomes[f"converted ({damaged})"] += 1
        except InputError:
            outcomes[f"refused ({damaged})"] += 1
        except Exception:
            print(f"fuzz: source model {n} of seed {seed}, {damaged}:", file=sys.stderr)
            raise
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= limit, f"source model {n} of seed {seed}: memory"
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"fuzz: {number} source models: {said}"


if __name__ == "__main__":
    main()
