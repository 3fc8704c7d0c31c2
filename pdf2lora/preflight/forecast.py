"""A forecast of a run before it starts: sequences, steps, memory, time, disk space, and the source of each number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dvc.config import Config

from pdf2lora.params import Params
from pdf2lora.paths import BASE
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.findings import Finding
from pdf2lora.preflight.model_shape import GIB, ModelShape
from pdf2lora.preflight.previous_run import PreviousRun
from pdf2lora.preflight.token_count import TokenCount
from pdf2lora.runtime.parallel import num_cores
from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.schedule import schedule_warnings
from pdf2lora.training.throughput import peak_flop_per_s

ADAPTER_BYTES_PER_PARAMETER = 4 + 4 + 2  # weight, gradient, 8-bit moments
# Of one token: 2 FLOP per parameter in the forward pass, 2 in the backward pass through frozen weights, 2 to recompute
# the forward pass. Attention scores, LoRA and the head's gradient are not counted.
FLOP_PER_PARAMETER = 6
GPU_UTILIZATION = 0.3  # of the data sheet's rate; a careful guess
CPU_GFLOP_PER_S = 10  # of one core, float32 with AVX2; measured with the demo on two cores


@dataclass(frozen=True)
class Estimate:
    """One number of the forecast.

    source: counted in existing data; measured on this machine by the previous run; computed from other numbers;
    estimated by a rule of thumb, which can be wrong by a factor of two; or unknown.
    """

    quantity: str
    value: str
    source: Literal["counted", "measured", "computed", "estimated", "unknown"]
    explanation: str


def forecast(
    params: Params, previous: PreviousRun, shape: ModelShape, gpus: Sequence[Gpu], tokens: TokenCount
) -> list[Estimate]:
    """The forecast of a run with these params on this machine."""
    num_sequences = training_sequences(params, tokens)
    text = f"{num_sequences:,} of {params.compute.seq_length} tokens for training"
    return [
        Estimate("sequences", text, tokens.source, tokens.explanation),
        step_estimate(previous, params, num_sequences),
        memory_estimate(previous, params, shape),
        time_estimate(previous, params, shape, gpus, num_sequences * params.compute.seq_length),
        disk_estimate(previous, shape),
    ]


def training_sequences(params: Params, tokens: TokenCount) -> int:
    """Sequences of one epoch: those of the corpus and of the replay text, if there is enough replay text."""
    share = 0.0 if params.train.replay == "none" else params.train.replay_share
    return round(tokens.num_sequences(params.compute.seq_length) / (1 - share))


def step_estimate(previous: PreviousRun, params: Params, num_sequences: int) -> Estimate:
    batch = effective_batch(previous, params)
    if batch is None:
        return Estimate("steps", "-", "unknown", "train.effective_batch is auto: find_batch chooses it")
    num_steps = DataOrder(num_sequences, batch, params.train.num_train_epochs, params.train.seed).num_steps
    text = f"sequences / effective batch {batch} x {params.train.num_train_epochs:g} epochs"
    return Estimate("steps", f"{num_steps:,} optimizer steps", "computed", text)


def effective_batch(previous: PreviousRun, params: Params) -> int | None:
    """train.effective_batch; if it is auto, the choice of the last find_batch, or None before the first one."""
    batch = params.train.effective_batch
    return previous.batch.get("effective_batch") if batch == "auto" else batch


def schedule_notes(previous: PreviousRun, params: Params, num_sequences: int) -> list[Finding]:
    """Warnings about the training's schedule, with the counted or estimated number of sequences."""
    batch = effective_batch(previous, params)
    if batch is None:
        return []
    warnings = schedule_warnings(params.train, num_sequences=num_sequences, effective_batch=batch)
    return [Finding("note", "training", text) for text in warnings]


def memory_estimate(previous: PreviousRun, params: Params, shape: ModelShape) -> Estimate:
    """The peak memory of the last batch search if its params and model were the same; else base and adapter alone."""
    batch = previous.batch
    if batch and previous.ran_with_same_params("find_batch") and previous.has_current_base:
        return Estimate(
            "memory",
            f"up to {_measured_peak_gib(batch):.2f} GiB for {batch['per_device_batch']} sequences, "
            f"budget {batch['budget_gib']:.2f} GiB",
            "measured",
            f"metrics/batch.json, device: {batch['device']}",
        )
    num_parameters = shape.lora_parameters(params.lora)
    fixed_gib = shape.base_gib(params.quantization) + num_parameters * ADAPTER_BYTES_PER_PARAMETER / GIB
    return Estimate(
        "memory",
        f"{fixed_gib:.2f} GiB plus the activations",
        "computed",
        f"base in {params.quantization.bits} bits, {num_parameters:,} LoRA parameters; find_batch measures the rest",
    )


def _measured_peak_gib(batch: Mapping[str, Any]) -> float:
    """The peak of the smallest probe that had at least the chosen batch."""
    peaks: list[float] = [
        probe["peak_gib"]
        for probe in batch["probes"]
        if probe["fits"]
        and probe["gradient_checkpointing"] == batch["gradient_checkpointing"]
        and probe["batch"] >= batch["per_device_batch"]
    ]
    return min(peaks)


def time_estimate(
    previous: PreviousRun, params: Params, shape: ModelShape, gpus: Sequence[Gpu], num_tokens: int
) -> Estimate:
    """The time of the training.

    num_tokens: of one epoch, with the padding of the last sequence.
    """
    num_trained_tokens = num_tokens * params.train.num_train_epochs
    gpu = gpus[0].name if gpus else None
    tokens_per_s = previous.machine.get("train", {}).get("tokens_per_s")
    is_same_machine = previous.machine.get("machine", {}).get("gpu") == gpu
    if tokens_per_s and is_same_machine and previous.has_current_base and previous.ran_with_same_seq_length:
        text = f"train ran at {tokens_per_s:,} tokens/s; other stages: {_other_stages(previous)}"
        return Estimate("time", format_duration(num_trained_tokens / tokens_per_s), "measured", text)
    flop = FLOP_PER_PARAMETER * shape.num_parameters * num_trained_tokens
    if gpu is None:
        duration_s = flop / (CPU_GFLOP_PER_S * 1e9 * num_cores())
        text = f"training alone: {CPU_GFLOP_PER_S} GFLOP/s per core, {num_cores()} cores"
        return Estimate("time", format_duration(duration_s), "estimated", text)
    peak = peak_flop_per_s(gpu)
    if peak is None:
        return Estimate("time", "-", "unknown", f"the speed of {gpu} is not known; find_batch measures it")
    text = f"training alone: {GPU_UTILIZATION:.0%} of {peak / 1e12:.0f} TFLOP/s"
    return Estimate("time", format_duration(flop / (GPU_UTILIZATION * peak)), "estimated", text)


def _other_stages(previous: PreviousRun) -> str:
    stages = {name: entry for name, entry in previous.machine.items() if name not in ("machine", "train")}
    return ", ".join(f"{name} {entry['seconds']:.0f} s" for name, entry in stages.items() if "seconds" in entry) or "-"


def format_duration(duration_s: float) -> str:
    if duration_s < 90:
        return f"{max(1, round(duration_s))} s"
    return f"{duration_s / 60:.0f} minutes" if duration_s < 90 * 60 else f"{duration_s / 3600:.1f} hours"


def disk_estimate(previous: PreviousRun, shape: ModelShape) -> Estimate:
    needed_gib = required_disk_gib(previous, shape)
    base_gib = f"{shape.num_bytes / GIB:.2f} GiB"
    if not needed_gib:
        text = "models/base exists"
    elif cache_has_links():
        text = f"{base_gib}: models/base, linked to DVC's cache"
    else:
        text = f"2 x {base_gib}: models/base and its copy in DVC's cache"
    return Estimate("disk", f"{needed_gib:.2f} GiB more", "computed", text)


def required_disk_gib(previous: PreviousRun, shape: ModelShape) -> float:
    """models/base and its copy in DVC's cache, unless they exist."""
    if previous.has_current_base and BASE.is_dir():
        return 0.0
    return (1 if cache_has_links() else 2) * shape.num_bytes / GIB


def cache_has_links() -> bool:
    """True if DVC links outputs to its cache instead of copying them (cache.type; docs/large-models.md)."""
    types = Config(dvc_dir=".dvc")["cache"].get("type", ["copy"])
    return types[0] in ("hardlink", "symlink")
