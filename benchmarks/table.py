"""Runs benchmarks.step for every system on this machine, one after the other, and writes the printed results.

    python -m benchmarks.table <results.json> ["<system> <gradient_checkpointing>:<batch> ..." ...]

The file has the rows, the machine, its driver, the versions and the date. Prints the table in Markdown.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from pdf2lora.preflight.environment import installed
from pdf2lora.runtime.files import write_json

RUNS = [
    "report full:19",
    "fused offload:19 full:19 offload:64 full:64 none:32 none:64",
    "fp8 full:64 none:32 none:64",
    "unsloth full:19 full:64",
    "unsloth none:32 none:64",
    "liger none:32 none:64",
    "liger full:19 full:64",
    "reference full:19 full:64",
]
LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth")


def main() -> None:
    file, *runs = sys.argv[1:]
    rows: list[dict[str, Any]] = []
    for run in runs or RUNS:
        command = [sys.executable, "-m", "benchmarks.step", *run.split()]
        finished = subprocess.run(command, capture_output=True, text=True)
        printed = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"system"')]
        rows += printed
        print(*map(json.dumps, printed), sep="\n", flush=True)
        if finished.returncode:
            print(f"{run}: exit status {finished.returncode}", finished.stderr[-1500:], flush=True)
        write_json(Path(file), {"machine": machine(), "rows": rows})
    print(markdown(rows))


def machine() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu, driver, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return {"date": str(date.today()), "gpu": gpu, "driver": driver, "memory": memory} | {
        library: installed(library) for library in LIBRARIES
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| system | checkpointing | batch | tokens/s | MFU | peak GiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["tokens_per_s"] is None:
            numbers = "out of memory | | "
        else:
            share = row["model_flops_utilization"]
            numbers = (
                f"{row['tokens_per_s']:,} | {'' if share is None else f'{share:.0%}'} | {row['peak_allocated_gib']:.1f}"
            )
        lines.append(f"| {row['system']} | {row['gradient_checkpointing']} | {row['batch']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
