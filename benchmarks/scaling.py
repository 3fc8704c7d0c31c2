"""Prints how the throughput of train grows with the number of processes.

    python -m benchmarks.scaling <machine.json> [<machine.json> ...]

Each file is a copy of metrics/machine.json after `python -m stages.train` with another compute.num_processes. One of
them must be of one process. The throughput is that of the median step, so start-up and validation do not count.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    files = sys.argv[1:]
    print(scaling_table([json.loads(Path(file).read_text(encoding="utf-8")) for file in files]))


def scaling_table(machines: list[dict[str, Any]]) -> str:
    """A Markdown table: processes, tokens/s, and the share of N times one process.

    machines: the contents of the files.

    Raises:
        ValueError: no file, or more than one, has a run of one process.
    """
    runs = sorted((machine["train"] for machine in machines), key=lambda run: int(run["num_processes"]))
    single = [run for run in runs if run["num_processes"] == 1]
    if len(single) != 1:
        raise ValueError(f"{len(single)} files have a run of one process; give one")
    lines = ["| processes | tokens/s | share of N times one | peak GiB per process |", "|---|---|---|---|"]
    for run in runs:
        share = run["step_tokens_per_s"] / (run["num_processes"] * single[0]["step_tokens_per_s"])
        peak = run.get("peak_reserved_gib", "")
        lines.append(f"| {run['num_processes']} | {run['step_tokens_per_s']:,} | {share:.1%} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
