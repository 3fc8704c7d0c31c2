"""Reads thousands of mutated PDFs and source models with the code of the pipeline.

    python -m tests.long.fuzz --pdfs 3000 --models 1000 --seed 1     (make fuzz)

No PDF may exceed its time or memory limit, crash the parent, or be missing in the results. Each source model must be
converted, or refused with an InputError, with limited memory.
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
from pdf2lora.documents.sources import Source
from pdf2lora.documents.worker import MAX_CHARACTERS
from pdf2lora.errors import InputError
from pdf2lora.runtime.files import file_sha256
from tests.tiny_pdfs import EXTRACT_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PDFS = ROOT / "data/pdfs/demo"
SOURCE_MODEL = ROOT / "models/source/demo"
SETTINGS = EXTRACT_SETTINGS.model_copy(
    update={"engines": ["pypdf2", "pdfium"], "timeout_s": 3.0, "memory_gib": 1.0, "min_characters": 300}
)
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
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="fuzz-") as folder:
        print(fuzz_pdfs(Path(folder) / "pdfs", arguments.pdfs, arguments.seed))
        print(fuzz_models(Path(folder) / "models", arguments.models, arguments.seed))


def fuzz_pdfs(folder: Path, number: int, seed: int, *, num_workers: int | None = None) -> str:
    """Returns a summary of the outcomes.

    Raises:
        AssertionError: a limit is exceeded or a result is missing. The message has the name of the file.
    """
    folder.mkdir(parents=True)
    originals = [path.read_bytes() for path in sorted(PDFS.rglob("*.pdf"))]
    files = []
    for n in range(number):
        files.append(folder / f"{n:05}.pdf")
        files[-1].write_bytes(mutate(originals, random.Random(f"{seed} {n}")))
    start_s = time.monotonic()
    outcomes: Counter[str] = Counter()
    files_with_result, last_s, longest_wait_s, largest_gib = [], start_s, 0.0, 0.0
    sources = {Source(file): file_sha256(file) for file in files}
    for source, extraction in extract(Path(), sources, SETTINGS, num_workers=num_workers):
        file = source.path
        files_with_result.append(file)
        outcomes[str(extraction.reason or "kept")] += 1
        longest_wait_s, last_s = max(longest_wait_s, time.monotonic() - last_s), time.monotonic()
        largest_gib = max([largest_gib, *(gib for gib in worker_gib())])
        assert (extraction.reason is None) == (len(extraction.text) >= 300), file
        assert len(extraction.text) <= 20 * MAX_CHARACTERS, file
    parent_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert sorted(files_with_result) == files, "results are missing"
    assert largest_gib <= SETTINGS.memory_gib, f"a worker uses {largest_gib:.2f} GiB"
    summary = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return (
        f"fuzz: {number} PDFs in {time.monotonic() - start_s:.0f} s: {summary}; longest wait {longest_wait_s:.1f} s, "
        f"largest worker {largest_gib:.2f} GiB, parent {parent_gib:.2f} GiB"
    )


def worker_gib() -> Iterator[float]:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            yield child.memory_info().rss / 2**30


def mutate(originals: list[bytes], rng: random.Random) -> bytes:
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


def remove_part(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice([1, 30, 1000, 20000])]
    content += b"\n"


def repeat(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.choice([10, 1000])] * rng.choice([1, 5])


def splice(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    other = rng.choice(originals)
    content[rng.randrange(len(content)) :] = other[rng.randrange(len(other)) :] or b"\n"


def replace_number(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    """Changes a length, a count, a reference (this can make a cycle) or an offset."""
    matches = list(re.finditer(rb"\b\d+\b", bytes(content)))
    if matches:
        target = rng.choice(matches)
        content[target.start() : target.end()] = rng.choice([*NUMBERS, *(match[0] for match in matches[:200])])


def replace_name(content: bytearray, originals: list[bytes], rng: random.Random) -> None:
    matches = list(re.finditer(rb"/[A-Za-z]+", bytes(content)))
    if matches:
        target = rng.choice(matches)
        content[target.start() : target.end()] = rng.choice([*NAMES, *(match[0] for match in matches[:100])])


MUTATIONS: list[Callable[[bytearray, list[bytes], random.Random], None]] = [
    flip,
    cut,
    remove_part,
    repeat,
    splice,
    replace_number,
    replace_number,
    replace_name,
]


def fuzz_models(folder: Path, number: int, seed: int, *, source: Path = SOURCE_MODEL) -> str:
    """Returns a summary of the outcomes.

    Raises:
        AssertionError: the peak memory grows by more than 512 MiB and twice the size of the undamaged files.
        Exception: `convert` raised another exception than InputError.
    """
    from pdf2lora.weights.conversion import convert

    names = sorted(path.name for path in source.iterdir() if path.name != "training.json")
    originals = {name: (source / name).read_bytes() for name in names}
    outcomes: Counter[str] = Counter()
    size_kib = sum(map(len, originals.values())) // 1024
    limit_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (512 << 10) + 2 * size_kib
    for n in range(number):
        rng = random.Random(f"{seed} {n}")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        (folder / "in").mkdir()
        damaged = rng.choice(names)
        for name, content in originals.items():
            new_content = mutate([content], rng) if name == damaged else content
            (folder / "in" / name).write_bytes(new_content)
        try:
            convert(folder / "in", folder / "out", llama_version="3.2", max_shard_gib=2.0)
            outcomes[f"converted ({damaged})"] += 1
        except InputError:
            outcomes[f"refused ({damaged})"] += 1
        except Exception:
            print(f"fuzz: model {n} of seed {seed}, {damaged}:", file=sys.stderr)
            raise
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= limit_kib, f"model {n} of seed {seed}: memory"
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"fuzz: {number} source models: {summary}"


if __name__ == "__main__":
    main()
