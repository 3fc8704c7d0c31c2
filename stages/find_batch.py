"""find_batch: models/base, data/split/train.jsonl -> metrics/batch.json

The largest per-device batch that fits, for each way of gradient checkpointing, and the fastest one that makes up
train.effective_batch. The throughputs that decide are this machine's: they go to metrics/machine.json.
"""

import logging
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import TrainerCallback

from pdf2lora.corpus import read_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.forward import Kernels, checkpointing_modes, choose_kernels
from pdf2lora.memory import (
    Child,
    Choice,
    Measurement,
    Mode,
    PeakMemory,
    choose,
    memory_model,
    search_modes,
)
from pdf2lora.model import limit_gpu_memory
from pdf2lora.orphans import after_orphans
from pdf2lora.params import Params, read_params
from pdf2lora.runtime import write_json
from pdf2lora.tokens import Encoder, Sequences
from pdf2lora.tracking import device_name, machine_metrics
from pdf2lora.training import build_model, build_trainer

BASE = Path("models/base")
TRAIN = Path("data/split/train.jsonl")
METRICS = Path("metrics/batch.json")


@report_input_errors
@after_orphans
def main() -> None:
    params = read_params()
    encoder = Encoder.of(BASE)
    encoder.require_context(params.train.seq_length)
    texts = [document.text for document in read_documents(TRAIN)]
    sequences = encoder.sequences(texts, seq_length=params.train.seq_length)
    kernels = choose_kernels(params.train, params.quantization, params.lora)
    modes = checkpointing_modes(params.train, kernels)

    with (
        machine_metrics("find_batch") as machine,
        tqdm(desc="find_batch", unit="probe", disable=None) as progress,
    ):
        child = Child(prepare_probes, params, sequences, kernels)
        budget_gib = memory_budget_gib(params, child)
        measured: dict[tuple[str, int], Measurement | None] = {}

        def measure(mode: str, batch: int) -> Measurement | None:
            measurement: Measurement | None = child.ask(training_step, mode, batch, budget_gib)
            measured[mode, batch] = measurement
            progress.update()
            progress.set_postfix(checkpointing=mode, batch=batch, gib=measurement and measurement.peak_gib)
            return measurement

        def tokens_per_s(mode: str, batch: int) -> float:
            measurement = measured.get((mode, batch)) or measure(mode, batch)
            return measurement.tokens_per_s if measurement else 0.0

        limits = params.find_batch
        searched = search_modes(measure, modes, smallest=limits.min, largest=limits.max, budget_gib=budget_gib)
        choice = choose(searched, params.train.effective_batch, tokens_per_s)
        child.end()
        machine["timings"] = [
            {"gradient_checkpointing": mode, "batch": batch, "tokens_per_s": round(measurement.tokens_per_s)}
            for (mode, batch), measurement in measured.items()
            if measurement
        ]

    write_json(METRICS, result(params, kernels, budget_gib, searched, choice))
    print(
        f"find_batch: {max(mode.largest for mode in searched)} sequences fit in {budget_gib:.2f} GiB "
        f"({sum(len(mode.probes) for mode in searched)} probes); train uses {choice.per_device_batch} x "
        f"{choice.gradient_accumulation_steps} accumulation steps, gradient checkpointing "
        f"{choice.gradient_checkpointing}, {kernels} kernels"
    )


def memory_budget_gib(params: Params, child: Child) -> float:
    """What a training step may hold: its tensors on a CPU, all that the allocator reserves on a GPU."""
    settings = params.find_batch
    if not torch.cuda.is_available():
        return settings.cpu_memory_gib
    free: float = child.ask(free_gib) or 0.0
    allowed = free if settings.memory_gib == "auto" else min(settings.memory_gib, free)
    if allowed <= settings.gpu_headroom_gib:
        raise InputError(
            f"find_batch.memory_gib: {allowed:.1f} GiB of the GPU are free or allowed, find_batch.gpu_headroom_gib "
            f"({settings.gpu_headroom_gib}) must be less; free the GPU (nvidia-smi) or change one of them"
        )
    return round(allowed - settings.gpu_headroom_gib, 1)


def result(
    params: Params, kernels: Kernels, budget_gib: float, searched: list[Mode], choice: Choice
) -> dict[str, object]:
    """The tree of metrics/batch.json."""
    return {
        "device": device_name(),
        "memory_gib": params.find_batch.memory_gib,
        "budget_gib": budget_gib,
        "largest_batch": max(mode.largest for mode in searched),
        "kernels": kernels,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "per_device_batch": choice.per_device_batch,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "effective_batch": choice.per_device_batch * choice.gradient_accumulation_steps,
        "modes": {
            mode.gradient_checkpointing: {"largest_batch": mode.largest}
            | ({"fixed_gib": round(line[0], 3), "gib_per_sequence": round(line[1], 4)} if line else {})
            for mode in searched
            for line in [memory_model(mode.probes)]
        },
        "probes": [
            {"gradient_checkpointing": mode.gradient_checkpointing, **asdict(probe)}
            for mode in searched
            for probe in mode.probes
        ],
    }


# in the child process


@dataclass(frozen=True)
class Prepared:
    params: Params
    sequences: Sequences
    kernels: Kernels
    model: PeftModel
    free_gib: float  # of the GPU, before the model was loaded


def prepare_probes(params: Params, sequences: Sequences, kernels: Kernels) -> Prepared:
    logging.disable()
    warnings.simplefilter("ignore")  # train says these things once, a probe need not
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
    model = build_model(BASE, params.quantization, params.lora, params.train)
    return Prepared(params, sequences, kernels, model, free)


def free_gib(prepared: Prepared) -> float:
    return prepared.free_gib


def training_step(prepared: Prepared, gradient_checkpointing: str, batch: int, budget_gib: float) -> Measurement:
    """Peak and throughput of `find_batch.steps` optimizer steps: the step that train runs, nothing left out."""
    params, sequences = prepared.params, prepared.sequences
    limit_gpu_memory(budget_gib)
    rows = np.arange(batch * params.find_batch.steps) % len(sequences)
    clock = StepClock()
    with TemporaryDirectory() as folder, PeakMemory() as peak:
        build_trainer(
            prepared.model,
            Sequences(sequences.input_ids[rows], sequences.labels[rows]),
            train=params.train,
            kernels=prepared.kernels,
            gradient_checkpointing=gradient_checkpointing,
            per_device_batch=batch,
            gradient_accumulation_steps=1,
            checkpoints=Path(folder),
            callbacks=[clock],
            max_steps=params.find_batch.steps,
        ).train()
        return Measurement(round(peak.gib, 3), batch * params.train.seq_length / clock.seconds_of_a_step)


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the steps after the first, which compiles kernels and fills the allocator."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds_of_a_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


if __name__ == "__main__":
    main()
