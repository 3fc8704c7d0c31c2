"""Runs the pipeline in two fresh clones under different conditions and compares dvc.lock.

The first has one core and one thread; the second all cores, two threads, its files in another order on disk and with
other dates, in a folder of another depth and name. --short: a few PDFs and a training of seconds, not the demo.
"""

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.long.clones import Failed, make_clone, outs, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--stages", nargs="+", default=["report"], help="up to which stages")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="same-bytes-") as folder:
        try:
            print(compare(Path(folder), arguments.stages, short=arguments.short, seed=arguments.seed))
        except Failed as failure:
            sys.exit(f"same_bytes: {failure}")


def compare(folder: Path, stages: list[str], *, short: bool, seed: int) -> str:
    """Gives the number of hashes that are the same, in words.

    Raises:
        Failed: a hash differs.
    """
    one, other = folder / "one", folder / "in another/folder of the same disk"
    seconds = []
    for clone, num_threads in ((one, 1), (other, 2)):
        clone.parent.mkdir(parents=True, exist_ok=True)
        make_clone(clone, short=short)
        if clone == other:
            shuffle(clone / "data/pdfs", random.Random(seed))
            shuffle(clone / "models/source", random.Random(seed))
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)} if clone == one else cores)
        started = time.monotonic()
        run(["dvc", "repro", *stages], clone, num_threads=num_threads, timeout_s=3600)
        os.sched_setaffinity(0, cores)
        seconds.append(time.monotonic() - started)
    hashes, other_hashes = outs(one / "dvc.lock"), outs(other / "dvc.lock")
    different = sorted(out for out in hashes.keys() | other_hashes.keys() if hashes.get(out) != other_hashes.get(out))
    if different:
        raise Failed(f"other bytes in {', '.join(different)}")
    if (one / "dvc.lock").read_bytes() != (other / "dvc.lock").read_bytes():
        raise Failed("all outputs are the same, but dvc.lock is not")
    return (
        f"same_bytes: dvc.lock is the same, {len(hashes)} outputs; {seconds[0]:.0f} s on one core with one thread, "
        f"{seconds[1]:.0f} s on {len(os.sched_getaffinity(0))} with two"
    )


def shuffle(folder: Path, rng: random.Random) -> None:
    """The same files, made again in another order, with dates up to ten years ago."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    rng.shuffle(files)
    for file in files:
        again = folder / file.relative_to(aside)
        again.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, again)
        date = time.time() - rng.uniform(0, 10 * 365 * 86400)
        os.utime(again, (date, date))
    shutil.rmtree(aside)


if __name__ == "__main__":
    main()
