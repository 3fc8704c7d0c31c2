"""find_batch: models/base, data/split/train.jsonl -> metrics/batch.json

The largest per-device batch that fits, and the one that train uses: the largest that divides train.effective_batch.
"""

import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from pdf2lora.corpus import read_documents
from pdf2lora.errors import report_input_errors
from pdf2lora.memory import PeakMemory, choose, measure_in_child, memory_model, search
from pdf2lora.orphans import after_orphans
from pdf2lora.params import Params, read_params
from pdf2lora.runtime import write_json
from pdf2lora.tokens import Encoder, Sequences, pack
from pdf2lora.tracking import machine_metrics
from pdf2lora.training import build_trainer

BASE = Path("models/base")
TRAIN = Path("data/split/train.jsonl")
METRICS = Path("metrics/batch.json")


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()
    encoder = Encoder.of(BASE)
    encoder.require_context(params.train.seq_length)
    texts = encoder.encode([document.text for document in read_documents(TRAIN)])
    sequences = pack(texts, bos=encoder.bos, eos=encoder.eos, seq_length=params.train.seq_length)

    settings = params.find_batch
    budget_gib = memory_budget_gib(params)
    with machine_metrics("find_batch"), tqdm(desc="find_batch", unit="probe", disable=None) as progress:

        def measure(batch: int) -> float | None:
            peak_gib = measure_in_child(training_step_gib, params, sequences, batch)
            progress.update()
            progress.set_postfix(batch=batch, gib=peak_gib)
            return None if peak_gib is None else round(peak_gib, 3)

        probes = search(measure, smallest=settings.min, largest=settings.max, budget_gib=budget_gib)
    per_device_batch, accumulation = choose(probes, params.train.effective_batch)
    line = memory_model(probes)

    largest = max(probe.batch for probe in probes if probe.fits)
    write_json(
        METRICS,
        {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "budget_gib": budget_gib,
            "largest_batch": largest,
            "per_device_batch": per_device_batch,
            "gradient_accumulation_steps": accumulation,
            "effective_batch": per_device_batch * accumulation,
            "memory_model": line and {"fixed_gib": round(line[0], 3), "gib_per_sequence": round(line[1], 4)},
            "probes": [asdict(probe) for probe in probes],
        },
    )
    print(
        f"find_batch: {largest} sequences fit in {budget_gib:.2f} GiB ({len(probes)} probes); "
        f"train uses {per_device_batch} x {accumulation} accumulation steps"
    )


def memory_budget_gib(params: Params) -> float:
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return round(free / 2**30 - params.find_batch.gpu_headroom_gib, 1)
    return params.find_batch.cpu_memory_gib


def training_step_gib(params: Params, sequences: Sequences, batch: int) -> float:
    """Peak GiB of `find_batch.steps` optimizer steps at this batch: the step that train runs, nothing left out."""
    logging.disable()
    warnings.simplefilter("ignore")  # train says these things once, a probe need not
    rows = np.arange(batch * params.find_batch.steps) % len(sequences)
    with TemporaryDirectory() as folder, PeakMemory() as peak:
        build_trainer(
            BASE,
            Sequences(sequences.input_ids[rows], sequences.labels[rows]),
            quantization=params.quantization,
            lora=params.lora,
            train=params.train,
            per_device_batch=batch,
            gradient_accumulation_steps=1,
            checkpoints=Path(folder),
            max_steps=params.find_batch.steps,
        ).train()
        return peak.gib


if __name__ == "__main__":
    main()
