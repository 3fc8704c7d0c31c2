"""Trains the demo with several seeds in a clone: what differs then is noise. python -m tests.long.noise_floor --seeds 5

Prints a row for each seed, the mean and the standard deviation, and the paired comparison (evaluate.compare_to) of each
two seeds: the largest difference that it finds between runs that differ in nothing but luck.
"""

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from pdf2lora.evaluation.comparison import DOCUMENTS, compare
from tests.long.clones import make_clone, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="a few PDFs and a training of seconds")
    arguments = parser.parse_args()
    tables, perplexities, improvements = [], [], []
    with TemporaryDirectory(prefix="noise-") as folder:
        clone = Path(folder) / "clone"
        make_clone(clone, short=arguments.short)
        for seed in range(arguments.seeds):
            run(["dvc", "exp", "run", "--set-param", f"train.seed={seed}"], clone, timeout_s=3600)
            metrics = json.loads((clone / "metrics/eval.json").read_text(encoding="utf-8"))
            perplexities.append(metrics["adapted"]["perplexity"])
            improvements.append(metrics["improvement"]["share"])
            tables.append(pd.read_csv(clone / DOCUMENTS))
            print(f"seed {seed}: perplexity {perplexities[-1]:.3f}, {improvements[-1]:.2%} lower than base", flush=True)
    mean, deviation = statistics.mean(perplexities), statistics.stdev(perplexities)
    print(f"perplexity {mean:.3f} +- {deviation:.3f} ({deviation / mean:.2%} of it, standard deviation over seeds)")
    print(f"improvement {statistics.mean(improvements):.2%} +- {statistics.stdev(improvements):.2%}")
    compared = [compare(one, other, num_samples=2000, seed=0) for one, other in combinations(tables, 2)]
    largest = max(compared, key=lambda c: abs(c.improvement))
    print(
        f"largest difference of two seeds {abs(largest.improvement):.2%}; the interval over documents excludes 0 in "
        f"{sum(c.differs for c in compared)} of {len(compared)} pairs"
    )


if __name__ == "__main__":
    main()
