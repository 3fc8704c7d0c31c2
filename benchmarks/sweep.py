"""Every way of gradient checkpointing at every batch that divides train.effective_batch, against what find_batch chose.

    python -m benchmarks.sweep <results.json>

Reads metrics/batch.json, and measures within the same memory budget by the same training step; out of memory is a
result. Prints how far the choice is from the best.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from benchmarks.table import machine
from pdf2lora.documents.records import read_documents
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING
from pdf2lora.params import read_params
from pdf2lora.tokens import Encoder
from pdf2lora.training.probe import prepare, training_step

BASE, TRAIN, METRICS = Path("models/base"), Path("data/split/train.jsonl"), Path("metrics/batch.json")


def main() -> None:
    params, chosen = read_params(), json.loads(METRICS.read_text())
    encoder = Encoder.load(BASE)
    texts = [document.text for document in read_documents(TRAIN)]
    sequences = encoder.sequences(texts, seq_length=params.compute.seq_length)
    prepared = prepare(BASE, params, sequences, chosen["kernels"])
    effective = chosen["effective_batch"]
    rows = []
    for mode in SUPPORTED_GRADIENT_CHECKPOINTING[prepared.kernels]:
        for batch in (batch for batch in range(1, effective + 1) if effective % batch == 0):
            gc.collect()
            torch.cuda.empty_cache()
            try:
                peak_gib, tokens_per_s = training_step(prepared, mode, batch, chosen["budget_gib"])
            except torch.OutOfMemoryError:
                break
            rows.append(
                {
                    "gradient_checkpointing": mode,
                    "batch": batch,
                    "tokens_per_s": round(tokens_per_s),
                    "peak_gib": peak_gib,
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
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
