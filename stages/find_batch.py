"""find_batch: models/base, data/split/train.jsonl -> metrics/batch.json

The largest per-device batch that fits, for each way of gradient checkpointing, and the fastest one that makes up
train.effective_batch. The throughputs that decide are this machine's: they go to metrics/machine.json.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from pdf2lora.documents.records import read_documents
from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import Params, read_params
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import single_instance
from pdf2lora.tokens import Encoder
from pdf2lora.training.batch_search import Choice, Measurement, Mode, choose, memory_model, search_modes
from pdf2lora.training.probe_process import Child

BASE = Path("models/base")
TRAIN = Path("data/split/train.jsonl")
METRICS = Path("metrics/batch.json")
PROGRESS = "{desc}: probe {n}, {elapsed}{postfix}"  # how many there will be is not known


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    with (
        Child("pdf2lora.training.probe") as child,  # first of all: it imports while this process goes on
        machine_metrics("find_batch") as machine,
        tqdm(desc="find_batch", disable=None, bar_format=PROGRESS) as progress,
    ):
        encoder = Encoder.of(BASE)
        encoder.require_context(params.compute.seq_length)
        texts = [document.text for document in read_documents(TRAIN)]
        sequences = encoder.sequences(texts, seq_length=params.compute.seq_length)
        device, kernels, modes = possibilities(params, child)
        child.prepare(BASE, params, sequences, kernels)
        budget_gib = memory_budget_gib(params, device, child)
        measured: dict[tuple[str, int], Measurement | None] = {}

        def measure(mode: str, batch: int) -> Measurement | None:
            measurement: Measurement | None = child.ask("training_step", mode, batch, budget_gib)
            measured[mode, batch] = measurement
            gib = f"{measurement.peak_gib:.2f}" if measurement else "-"
            progress.set_postfix(checkpointing=mode, batch=batch, gib=gib, refresh=False)
            progress.update()
            return measurement

        def tokens_per_s(mode: str, batch: int) -> float:
            measurement = measured.get((mode, batch)) or measure(mode, batch)
            return measurement.tokens_per_s if measurement else 0.0

        limits = params.find_batch
        searched = search_modes(measure, modes, smallest=limits.min, largest=limits.max, budget_gib=budget_gib)
        choice = choose(searched, params.train.effective_batch, tokens_per_s)
        machine["timings"] = [
            {"gradient_checkpointing": mode, "batch": batch, "tokens_per_s": round(measurement.tokens_per_s)}
            for (mode, batch), measurement in measured.items()
            if measurement
        ]

    write_json(METRICS, result(params, device, kernels, budget_gib, searched, choice))
    num_probes = sum(len(mode.probes) for mode in searched)
    print(
        f"find_batch: {max(mode.largest for mode in searched)} sequences fit in {budget_gib:.2f} GiB "
        f"({num_probes} probe{'s' if num_probes > 1 else ''}); train uses {choice.per_device_batch} x "
        f"{choice.gradient_accumulation_steps} accumulation steps, gradient checkpointing "
        f"{choice.gradient_checkpointing}, {kernels} kernels"
    )


def possibilities(params: Params, child: Child) -> tuple[str, str, tuple[str, ...]]:
    """Device, kernels and ways of gradient checkpointing: probe.possibilities."""
    answer: tuple[str, str, tuple[str, ...]] | None = child.ask("possibilities", params)
    if answer is None:
        raise InputError(
            "find_batch: memory ends before the base model is loaded, while torch and transformers are imported; free "
            "some (free -h shows it) and run dvc repro again"
        )
    return answer


def memory_budget_gib(params: Params, device: str, child: Child) -> float:
    """What a training step may hold: its tensors on a CPU, all that the allocator reserves on a GPU."""
    settings = params.find_batch
    if device == "cpu":
        return settings.cpu_memory_gib
    free: float = child.ask("free_gib") or 0.0
    allowed = free if settings.memory_gib == "auto" else min(settings.memory_gib, free)
    if allowed <= settings.gpu_headroom_gib:
        raise InputError(
            f"find_batch.memory_gib: {allowed:.1f} GiB of the GPU are free or allowed, find_batch.gpu_headroom_gib "
            f"({settings.gpu_headroom_gib}) must be less; free the GPU (nvidia-smi) or change one of them"
        )
    return round(allowed - settings.gpu_headroom_gib, 1)


def result(
    params: Params, device: str, kernels: str, budget_gib: float, searched: list[Mode], choice: Choice
) -> dict[str, object]:
    """The tree of metrics/batch.json."""
    return {
        "device": device,
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


if __name__ == "__main__":
    main()
