"""Trains the demo with several seeds in a clone and prints the seed noise: python -m tests.long.noise_floor --seeds 5

Prints the perplexity of each seed, mean and standard deviation, the paired comparison of each pair of seeds, and the
largest difference.
"""

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from pdf2lora.evaluation.comparison import compare, require_pairs
from pdf2lora.paths import EVAL_DOCUMENTS
from tests.long.clones import make_clone, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="uses a few PDFs and trains for seconds")
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
            tables.append(pd.read_csv(clone / EVAL_DOCUMENTS))
            print(f"seed {seed}: perplexity {perplexities[-1]:.3f}, {improvements[-1]:.2%} lower than base", flush=True)
    mean, deviation = statistics.mean(perplexities), statistics.stdev(perplexities)
    print(f"perplexity {mean:.3f} +- {deviation:.3f} ({deviation / mean:.2%}; standard deviation over seeds)")
    print(f"improvement {statistics.mean(improvements):.2%} +- {statistics.stdev(improvements):.2%}")
    comparisons = [require_pairs(compare(one, other)) for one, other in combinations(tables, 2)]
    largest = max(abs(comparison.improvement.value) for comparison in comparisons)
    print(
        f"largest difference of two seeds {largest:.2%}; significant at 95% in "
        f"{sum(comparison.significant for comparison in comparisons)} of {len(comparisons)} pairs"
    )


if __name__ == "__main__":
    main()
