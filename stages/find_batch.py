"""find_batch: models/base, data/tokens/train.npy -> metrics/batch.json

Finds the largest per-device batch that fits for each value of gradient_checkpointing. Then chooses the fastest batch,
gradient_checkpointing and place of the decoder layers (quantization.placement) for train.effective_batch. The measured
throughputs are numbers of this machine, so they are in metrics/machine.json.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from typing import Any, NamedTuple

from tqdm import tqdm

from pdf2lora.errors import InputError
from pdf2lora.params import FindBatch, Params, Placement, read_params
from pdf2lora.paths import BASE, BATCH
from pdf2lora.runtime.files import write_json
from pdf2lora.runtime.inputs import require_inputs_of
from pdf2lora.runtime.launcher import allot_devices
from pdf2lora.runtime.monitor import machine_metrics
from pdf2lora.runtime.processes import stage_main
from pdf2lora.tokens import require_context
from pdf2lora.training.batch_search import (
    AS_FAST,
    Choice,
    Measurement,
    Mode,
    choose,
    memory_model,
    search_modes,
    share_of_process,
)
from pdf2lora.training.probe_processes import Capabilities, ProbeProcesses

PROGRESS = "{desc}: probe {n}, {elapsed}{postfix}"  # the number of probes is not known in advance


@stage_main
def main() -> None:
    params = read_params()
    require_inputs_of("find_batch")
    require_context(BASE, {"compute.seq_length": params.compute.seq_length})
    with (
        allot_devices(params.compute.num_processes) as (num_processes, _),
        ProbeProcesses(params, num_processes) as probes,
        machine_metrics("find_batch") as machine,
        tqdm(desc="find_batch", disable=None, bar_format=PROGRESS) as progress,
    ):
        capabilities = probes.capabilities()
        budget_gib = memory_budget_gib(params.find_batch, capabilities)
        timings: list[dict[str, Any]] = []

        @cache
        def measure(placement: Placement, gradient_checkpointing: str, batch: int) -> Measurement | None:
            measurement = probes.measure(gradient_checkpointing, batch, budget_gib, placement)
            if measurement:
                case = {"placement": placement, "gradient_checkpointing": gradient_checkpointing, "batch": batch}
                timings.append(case | {"tokens_per_s": round(measurement.tokens_per_s)})
            gib = f"{measurement.peak_gib:.2f}" if measurement else "-"
            progress.set_postfix(gradient_checkpointing=gradient_checkpointing, batch=batch, gib=gib, refresh=False)
            progress.update()
            return measurement

        outcome = fastest_placement(params, capabilities, num_processes, budget_gib, measure)
        machine["timings"] = timings

    searched, choice = outcome.searched, outcome.choice
    result = batch_json(params, capabilities, num_processes, budget_gib, outcome)
    write_json(BATCH, result)
    num_probes = sum(len(mode.probes) for mode in searched)
    reason = capabilities.reference_reason
    in_processes = f" in {num_processes} processes, {result['effective_batch']} sequences in all" * (num_processes > 1)
    print(
        f"find_batch: {result['largest_batch']} sequences fit in {budget_gib:.2f} GiB "
        f"({num_probes} probe{'s' if num_probes > 1 else ''}); train uses {choice.per_device_batch} x "
        f"{choice.gradient_accumulation_steps} accumulation steps{in_processes}, "
        f"gradient checkpointing {choice.gradient_checkpointing}, "
        f"{capabilities.kernels} kernels{reason and f' ({reason})'}"
        f"{', layers in host memory' if outcome.placement == 'host' else ''}"
    )


class Outcome(NamedTuple):
    """The result of a search with one placement of the decoder layers."""

    placement: Placement
    searched: list[Mode]
    choice: Choice


def fastest_placement(
    params: Params,
    capabilities: Capabilities,
    num_processes: int,
    budget_gib: float,
    measure: Callable[[Placement, str, int], Measurement | None],
) -> Outcome:
    """Searches with layers in GPU memory. If they do not fit or need recomputation, also with layers in host memory.

    Without recomputation, layers in host memory are not faster.

    Raises InputError if no probe fits.
    """

    def tokens_per_s(placement: Placement, gradient_checkpointing: str, batch: int) -> float:
        measurement = measure(placement, gradient_checkpointing, batch)
        return measurement.tokens_per_s if measurement else 0.0

    def speed(outcome: Outcome) -> float:
        choice = outcome.choice
        return tokens_per_s(outcome.placement, choice.gradient_checkpointing, choice.per_device_batch)

    placements = list(capabilities.placements)
    if len(placements) > 1 and capabilities.resident_gib > budget_gib:
        placements.remove("gpu")
    best: Outcome | None = None
    for placement in placements:
        searched = search_modes(
            partial(measure, placement),
            capabilities.gradient_checkpointing,
            smallest=params.find_batch.min,
            largest=params.find_batch.max,
            budget_gib=budget_gib,
            enough=sufficient_batch(params, capabilities.device, num_processes),
        )
        is_last = placement == placements[-1]
        if not any(mode.largest for mode in searched) and (best or not is_last):
            continue
        choice = choose(searched, params.train.effective_batch, partial(tokens_per_s, placement), num_processes)
        outcome = Outcome(placement, searched, choice)
        if best is None or speed(outcome) * AS_FAST > speed(best):
            best = outcome
        if choice.gradient_checkpointing == capabilities.gradient_checkpointing[0]:
            break
    assert best is not None
    return best


def sufficient_batch(params: Params, device: str, num_processes: int) -> int:
    """If so many sequences fit with a value of gradient_checkpointing, the values that recompute more are not measured.

    On a GPU these are all sequences that a process computes of a step: a step with more recomputation is slower. On a
    CPU, the first value that fits is chosen: a comparison of times could choose differently on another CPU.
    """
    settings, effective_batch = params.find_batch, params.train.effective_batch
    if device == "cpu":
        return settings.min
    if effective_batch == "auto":
        return settings.max
    return min(settings.max, share_of_process(effective_batch, num_processes))


def memory_budget_gib(settings: FindBatch, capabilities: Capabilities) -> float:
    """Memory that a training step may use: its tensors on a CPU, the memory that the allocator reserves on a GPU.

    Raises InputError if the headroom is not smaller than the memory.
    """
    if capabilities.device == "cpu":
        return settings.cpu_memory_gib
    budget_gib = settings.gpu_budget_gib(capabilities.free_gib)
    if budget_gib <= 0:
        raise InputError(
            f"find_batch.memory_gib: {budget_gib + settings.gpu_headroom_gib:.1f} GiB of the GPU are free or allowed, "
            f"and find_batch.gpu_headroom_gib ({settings.gpu_headroom_gib}) must be less. Free the GPU (nvidia-smi) or "
            "change one of them."
        )
    return round(budget_gib, 1)


def batch_json(
    params: Params, capabilities: Capabilities, num_processes: int, budget_gib: float, outcome: Outcome
) -> dict[str, Any]:
    """The content of metrics/batch.json."""
    placement, searched, choice = outcome
    effective = params.train.effective_batch
    return {
        "device": capabilities.device,
        "num_processes": num_processes,
        "memory_gib": params.find_batch.memory_gib,
        "budget_gib": budget_gib,
        "largest_batch": max(mode.largest for mode in searched),
        "kernels": capabilities.kernels,
        "placement": placement,
        "gradient_checkpointing": choice.gradient_checkpointing,
        "per_device_batch": choice.per_device_batch,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "effective_batch": choice.per_device_batch * num_processes if effective == "auto" else effective,
        "modes": {mode.gradient_checkpointing: mode_json(mode) for mode in searched},
        "probes": [
            {"gradient_checkpointing": mode.gradient_checkpointing, **asdict(probe)}
            for mode in searched
            for probe in mode.probes
        ],
    }


def mode_json(mode: Mode) -> dict[str, Any]:
    """The largest batch of one value of gradient_checkpointing, and its memory model if there are enough probes."""
    model = memory_model(mode.probes)
    if model is None:
        return {"largest_batch": mode.largest}
    fixed_gib, gib_per_sequence = model
    return {
        "largest_batch": mode.largest,
        "fixed_gib": round(fixed_gib, 3),
        "gib_per_sequence": round(gib_per_sequence, 4),
    }


if __name__ == "__main__":
    main()
