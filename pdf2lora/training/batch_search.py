"""Finds the largest per-device batch that fits, and chooses the fastest one: memory model, search, choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pdf2lora.errors import InputError

AS_FAST = 0.98  # candidates with 98% of the best throughput count as equally fast; the one with least memory is chosen


class Measurement(NamedTuple):
    """The peak of a probe's tensors, and its throughput."""

    peak_gib: float
    tokens_per_s: float


@dataclass(frozen=True)
class Probe:
    """A training step at one batch size. peak_gib is None if the step ran out of memory."""

    batch: int
    fits: bool
    peak_gib: float | None


@dataclass(frozen=True)
class Mode:
    """The probes with one value of gradient_checkpointing."""

    gradient_checkpointing: str
    probes: list[Probe]

    @property
    def largest(self) -> int:
        """The largest batch that fits; 0 if none fits."""
        return max((probe.batch for probe in self.probes if probe.fits), default=0)

    def peak_gib(self, batch: int) -> float | None:
        """The measured peak of this batch, or the memory model's peak if the batch was not probed."""
        measured = {probe.batch: probe.peak_gib for probe in self.probes}
        line = memory_model(self.probes)
        return measured.get(batch) or (line and line[0] + line[1] * batch)


class Choice(NamedTuple):
    gradient_checkpointing: str
    per_device_batch: int
    gradient_accumulation_steps: int


Measure = Callable[[str, int], Measurement | None]


def search(measure: Callable[[int], float | None], *, smallest: int, largest: int, budget_gib: float) -> list[Probe]:
    """Finds the largest batch from `smallest` to `largest` whose peak is within the budget. Returns all its probes.

    measure(batch) returns the peak in GiB, or None if the step ran out of memory.

    Memory grows nearly linearly with the batch, so the line through two probes predicts the largest batch that fits.
    The search probes there and narrows the bounds: the largest batch that fits, and the smallest that does not. A
    prediction outside the bounds is moved inside them. If the predictions are wrong, the search approaches bisection.
    The result is exact: it fits, and the next batch does not.
    """
    probes: list[Probe] = []

    def probe(batch: int) -> bool:
        peak = measure(batch)
        probes.append(Probe(batch, peak is not None and peak <= budget_gib, peak))
        return probes[-1].fits

    if not probe(smallest):
        return probes
    fits, too_large = smallest, largest + 1
    while too_large - fits > 1:
        line = memory_model(probes)
        predicted = int((budget_gib - line[0]) / line[1]) if line and line[1] > 0 else 2 * fits
        margin = min(2 ** max(0, len(probes) - 4), (too_large - fits) // 2)
        batch = min(max(predicted, fits + margin), too_large - margin)
        if probe(batch):
            fits = batch
        else:
            too_large = batch
    return probes


def memory_model(probes: list[Probe]) -> tuple[float, float] | None:
    """(GiB at batch 0, GiB per sequence): the line through the two largest batches that did not run out of memory."""
    ended = sorted((p.batch, p.peak_gib) for p in probes if p.peak_gib is not None)
    if len(ended) < 2:
        return None
    (few, low), (many, high) = ended[-2:]
    per_sequence = (high - low) / (many - few)
    return low - per_sequence * few, per_sequence


def search_modes(
    measure: Measure, modes: Sequence[str], *, smallest: int, largest: int, budget_gib: float, enough: int
) -> list[Mode]:
    """Searches each mode, from the fastest step to the one with the smallest memory, until `enough` sequences fit.

    A mode that recomputes more is not faster at the same batch. It helps only at batches that did not fit before.
    """
    searched: list[Mode] = []
    for mode in modes:

        def measure_peak(batch: int, mode: str = mode) -> float | None:
            measured = measure(mode, batch)
            return None if measured is None else measured.peak_gib

        searched.append(Mode(mode, search(measure_peak, smallest=smallest, largest=largest, budget_gib=budget_gib)))
        if searched[-1].largest >= enough:
            break
    return searched


def choose(
    modes: Sequence[Mode],
    effective_batch: int | Literal["auto"],
    tokens_per_s: Callable[[str, int], float],
    num_processes: int,
) -> Choice:
    """Returns the fastest choice that fits.

    Each mode has one candidate, the result of per_device_batch. Of candidates that are equally fast, the one with the
    least memory is chosen. tokens_per_s(mode, batch) is called only if there are several candidates.

    Raises InputError if no probe of any mode fits.
    """
    candidates = [
        (mode, per_device_batch(mode.largest, effective_batch, num_processes)) for mode in modes if mode.largest
    ]
    if not candidates:
        first = modes[-1].probes[0]
        peak = f"needs {first.peak_gib:.3g} GiB" if first.peak_gib else "runs out of memory"
        raise InputError(
            f"find_batch.min: {first.batch} sequences do not fit: a training step {peak}. Lower find_batch.min, "
            "compute.seq_length or a high lora.r, set train.gradient_checkpointing to auto, or raise "
            "find_batch.cpu_memory_gib (on a GPU: raise find_batch.memory_gib or lower find_batch.gpu_headroom_gib)."
        )
    if len(candidates) > 1:
        speeds = [tokens_per_s(mode.gradient_checkpointing, batch) for mode, batch in candidates]
        fastest = max(speeds)
        fast = [candidate for candidate, speed in zip(candidates, speeds, strict=True) if speed >= AS_FAST * fastest]
        candidates = sorted(fast, key=lambda candidate: candidate[0].peak_gib(candidate[1]) or 0.0)
    mode, batch = candidates[0]
    accumulation = (
        1 if effective_batch == "auto" else math.ceil(share_of_process(effective_batch, num_processes) / batch)
    )
    return Choice(mode.gradient_checkpointing, batch, accumulation)


def per_device_batch(largest: int, effective_batch: int | Literal["auto"], num_processes: int) -> int:
    """Sequences of one micro-batch. A step has as few micro-batches as fit, of sizes as equal as possible."""
    if effective_batch == "auto":
        return largest
    share = share_of_process(effective_batch, num_processes)
    return math.ceil(share / math.ceil(share / largest))


def share_of_process(effective_batch: int, num_processes: int) -> int:
    """The largest number of sequences that one process computes of a step."""
    return math.ceil(effective_batch / num_processes)
