"""Measures each gradient_checkpointing at each micro-batch of train.effective_batch; compares find_batch's choice.

    python -m benchmarks.sweep <results.json>

Reads metrics/batch.json of one process and measures the same training step within the same memory budget. Prints the
throughput of the choice as a share of the best one.
"""

import json
import sys
from pathlib import Path

from benchmarks.table import machine
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING
from pdf2lora.params import read_params
from pdf2lora.paths import BASE, BATCH, TOKENS
from pdf2lora.runtime.files import write_json
from pdf2lora.token_files import TokenFile
from pdf2lora.training.batch_search import Measurement, per_device_batch
from pdf2lora.training.probe import Prober


def main() -> None:
    params, chosen = read_params(), json.loads(BATCH.read_text())
    sequences = TokenFile.open(TOKENS, "train").sequences(params.compute.seq_length)
    prober = Prober(params)
    effective = chosen["effective_batch"]
    batches = sorted({per_device_batch(largest, effective, 1) for largest in range(1, effective + 1)})
    rows = []
    for setting in SUPPORTED_GRADIENT_CHECKPOINTING[chosen["kernels"]]:
        for batch in batches:
            measurement = prober.measure(BASE, sequences, setting, batch, chosen["budget_gib"], chosen["placement"])
            if not isinstance(measurement, Measurement):
                break
            rows.append(
                {
                    "gradient_checkpointing": setting,
                    "batch": batch,
                    "tokens_per_s": round(measurement.tokens_per_s),
                    "peak_gib": measurement.peak_gib,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    best = max(rows, key=lambda row: row["tokens_per_s"])
    choice = next(
        row
        for row in rows
        if (row["gradient_checkpointing"], row["batch"])
        == (chosen["gradient_checkpointing"], chosen["per_device_batch"])
    )
    share = choice["tokens_per_s"] / best["tokens_per_s"]
    print(f"budget {chosen['budget_gib']} GiB: best {best}, chosen {choice}, {share:.1%} of the best")
    result = {"machine": machine(), "budget_gib": chosen["budget_gib"], "best": best, "chosen": choice, "rows": rows}
    write_json(Path(sys.argv[1]), result)


if __name__ == "__main__":
    main()
