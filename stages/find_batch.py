"""find_batch: models/base, data/tokens/train.npy -> metrics/batch.json

The largest per-device batch that fits, for each value of gradient_checkpointing, and the fastest choice for
train.effective_batch. The throughputs that decide are this machine's: they go to metrics/machine.json.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdf2lora.errors import InputError, report_input_errors
from pdf2lora.params import FindBatch, Params, read_params
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.launcher import allot_devices
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import single_instance
from pdf2lora.tokens import require_context
from pdf2lora.training.batch_search import Choice, Measurement, Mode, choose, memory_model, search_modes
from pdf2lora.training.probe_processes import Capabilities, ProbeProcesses

BASE = Path("models/base")
TRAIN = Path("data/tokens/train.npy")
METRICS = Path("metrics/batch.json")
PROGRESS = "{desc}: probe {n}, {elapsed}{postfix}"  # the number of probes is not known in advance


@report_input_errors
@single_instance
def main() -> None:
    params = read_params()
    require_inputs_of("find_batch")
    require_context(BASE, params.compute.seq_length)
    with (
        allot_devices(params.compute.num_processes) as (num_processes, _),
        ProbeProcesses(params, num_processes) as probes,
        machine_metrics("find_batch") as machine,
        tqdm(desc="find_batch", disable=None, bar_format=PROGRESS) as progress,
    ):
        capabilities = probes.capabilities()
        budget_gib = memory_budget_gib(params.find_batch, capabilities)
        measured: dict[tuple[str, int], Measurement | None] = {}

        def measure(gradient_checkpointing: str, batch: int) -> Measurement | None:
            measurement = probes.measure(gradient_checkpointing, batch, budget_gib)
            measured[gradient_checkpointing, batch] = measurement
            gib = f"{measurement.peak_gib:.2f}" if measurement else "-"
            progress.set_postfix(gradient_checkpointing=gradient_checkpointing, batch=batch, gib=gib, refresh=False)
            progress.update()
            return measurement

        def tokens_per_s(gradient_checkpointing: str, batch: int) -> float:
            measurement = measured.get((gradient_checkpointing, batch)) or measure(gradient_checkpointing, batch)
            return measurement.tokens_per_s if measurement else 0.0

        limits = params.find_batch
        searched = search_modes(
            measure,
            capabilities.gradient_checkpointing,
            smallest=limits.min,
            largest=limits.max,
            budget_gib=budget_gib,
        )
        choice = choose(searched, params.train.effective_batch, tokens_per_s, num_processes)
        machine["timings"] = [
            {"gradient_checkpointing": setting, "batch": batch, "tokens_per_s": round(measurement.tokens_per_s)}
            for (setting, batch), measurement in measured.items()
            if measurement
        ]

    result = batch_json(params, capabilities, num_processes, budget_gib, searched, choice)
    write_json(METRICS, result)
    num_probes = sum(len(mode.probes) for mode in searched)
    print(
        f"find_batch: {result['largest_batch']} sequences fit in {budget_gib:.2f} GiB "
        f"({num_probes} probe{'s' if num_probes > 1 else ''}); train uses {choice.per_device_batch} x "
        f"{choice.gradient_accumulation_steps} accumulation steps in {num_processes} "
        f"process{'es' if num_processes > 1 else ''}, gradient checkpointing {choice.gradient_checkpointing}, "
        f"{capabilities.kernels} kernels"
    )


def memory_budget_gib(settings: FindBatch, capabilities: Capabilities) -> float:
    """What a training step may hold: its tensors on a CPU, all that the allocator reserves on a GPU.

    Raises:
        InputError: the headroom leaves nothing.
    """
    if capabilities.device == "cpu":
        return settings.cpu_memory_gib
    free = capabilities.free_gib
    allowed = free if settings.memory_gib == "auto" else min(settings.memory_gib, free)
    if allowed <= settings.gpu_headroom_gib:
        raise InputError(
            f"find_batch.memory_gib: {allowed:.1f} GiB of the GPU are free or allowed, and "
            f"find_batch.gpu_headroom_gib ({settings.gpu_headroom_gib}) must be less. Free the GPU (nvidia-smi) or "
            "change one of them."
        )
    return round(allowed - settings.gpu_headroom_gib, 1)


def batch_json(
    params: Params,
    capabilities: Capabilities,
    num_processes: int,
    budget_gib: float,
    searched: list[Mode],
    choice: Choice,
) -> dict[str, Any]:
    """The content of metrics/batch.json."""
    effective = params.train.effective_batch
    return {
        "device": capabilities.device,
        "num_processes": num_processes,
        "memory_gib": params.find_batch.memory_gib,
        "budget_gib": budget_gib,
        "largest_batch": max(mode.largest for mode in searched),
        "kernels": capabilities.kernels,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "per_device_batch": choice.per_device_batch,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "effective_batch": choice.per_device_batch * num_processes if effective == "auto" else effective,
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
