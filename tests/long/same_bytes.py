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
from pathlib import Path
from tempfile import TemporaryDirectory

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
        raise Failed(f"different bytes in {', '.join(different)}")
    if (one / "dvc.lock").read_bytes() != (other / "dvc.lock").read_bytes():
        raise Failed("all outputs are the same, but dvc.lock differs")
    return (
        f"same_bytes: dvc.lock is the same, {len(hashes)} outputs; {seconds[0]:.0f} s on one core with one thread, "
        f"{seconds[1]:.0f} s on {len(os.sched_getaffinity(0))} with two"
    )


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
