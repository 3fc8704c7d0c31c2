"""Runs the pipeline in two fresh clones under different conditions and compares dvc.lock.

The first clone has one core and one thread. The second has all cores and two threads; its files have another order on
disk and other dates, and its folder has another depth and name. --short: a few PDFs and a training of seconds instead
of the demo.
"""

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.long.clones import Failed, make_clone, outs, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--stages", nargs="+", default=["report"], help="last stages to run")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="same-bytes-") as folder:
        try:
            print(compare(Path(folder), arguments.stages, short=arguments.short, seed=arguments.seed))
        except Failed as failure:
            sys.exit(f"same_bytes: {failure}")


def compare(folder: Path, stages: list[str], *, short: bool, seed: int) -> str:
    """Returns a summary with the number of equal hashes.

    Raises:
        Failed: a hash differs.
    """
    one, other = folder / "one", folder / "in another/folder of the same disk"
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        make_clone(one, short=short)
        seconds = run_stages(one, stages, num_threads=1)
    finally:
        os.sched_setaffinity(0, cores)
    make_other_clone(other, short=short, seed=seed)
    other_seconds = run_stages(other, stages, num_threads=2)
    num_outputs = require_same(one, other)
    return (
        f"same_bytes: dvc.lock is the same, {num_outputs} outputs; {seconds:.0f} s on one core with one thread, "
        f"{other_seconds:.0f} s on {len(cores)} with two"
    )


def make_other_clone(clone: Path, *, short: bool, seed: int, settings: dict[str, Any] | None = None) -> None:
    """A clone with its files in another order and with other dates."""
    clone.parent.mkdir(parents=True, exist_ok=True)
    make_clone(clone, short=short, settings=settings)
    shuffle(clone / "data/pdfs", random.Random(seed))
    shuffle(clone / "models/source", random.Random(seed))


def run_stages(clone: Path, stages: Sequence[str], *, num_threads: int) -> float:
    """Returns the seconds that it took."""
    started = time.monotonic()
    run(["dvc", "repro", *stages], clone, num_threads=num_threads, timeout_s=3600)
    return time.monotonic() - started


def require_same(one: Path, other: Path) -> int:
    """Returns the number of outputs in dvc.lock.

    Raises:
        Failed: a hash differs.
    """
    hashes, other_hashes = outs(one / "dvc.lock"), outs(other / "dvc.lock")
    different = sorted(out for out in hashes.keys() | other_hashes.keys() if hashes.get(out) != other_hashes.get(out))
    if different:
        raise Failed(f"different bytes in {', '.join(different)}")
    if (one / "dvc.lock").read_bytes() != (other / "dvc.lock").read_bytes():
        raise Failed("all outputs are the same, but dvc.lock differs")
    return len(hashes)


def shuffle(folder: Path, rng: random.Random) -> None:
    """Writes the files again in another order, with dates up to ten years ago."""
    original = folder.with_name("original")
    folder.rename(original)
    files = sorted(path for path in original.rglob("*") if path.is_file())
    rng.shuffle(files)
    for file in files:
        copy = folder / file.relative_to(original)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        date = time.time() - rng.uniform(0, 10 * 365 * 86400)
        os.utime(copy, (date, date))
    shutil.rmtree(original)


if __name__ == "__main__":
    main()
