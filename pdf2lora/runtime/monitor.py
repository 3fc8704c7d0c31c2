"""What the machine did while a stage ran: seconds, memory, and a GPU's utilization, power and energy.

No two runs share these numbers, so metrics/machine.json and the curves beside it are no stage's output.

torch is imported by the functions that need it: find_batch has asked its child before it calls one, and so imports
while the child does.
"""

import functools
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from pdf2lora.runtime.files import write_json

MACHINE = Path("metrics/machine.json")
CURVES = Path("metrics/machine")
SAMPLE_S = 1.0

log = logging.getLogger(__name__)


class Meter:
    """Seconds since it was made, and the joules of the GPU where that counts them."""

    def __init__(self) -> None:
        self.gpu = this_gpu()
        self.started = time.monotonic()
        self.joules_before = self.gpu.joules()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def joules(self) -> float | None:
        now = self.gpu.joules()
        return None if now is None or self.joules_before is None else now - self.joules_before

    def rates(self, num_tokens: int) -> dict[str, int]:
        """Of so many tokens since it was made: tokens_per_s, and joules_per_million_tokens where energy is known."""
        rates = {"tokens_per_s": round(num_tokens / self.seconds)}
        if num_tokens and (joules := self.joules) is not None:
            rates["joules_per_million_tokens"] = round(joules / num_tokens * 1e6)
        return rates


@contextmanager
def machine_metrics(stage: str) -> Iterator[dict[str, Any]]:
    """Samples memory, and a GPU's utilization and power, while the block runs; the block may add numbers of its own.

    Writes the stage's entry of metrics/machine.json and metrics/machine/<stage>.tsv.
    """
    samples: list[dict[str, float]] = []
    own: dict[str, Any] = {}
    finished = threading.Event()
    meter = Meter()

    def sample() -> None:
        process = psutil.Process()
        while True:
            samples.append({"seconds": round(meter.seconds, 1), **_memory(process), **meter.gpu.read()})
            if finished.wait(SAMPLE_S):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield own
    finally:
        finished.set()
        sampler.join()
    columns = list(dict.fromkeys(chain.from_iterable(samples)))
    entry = {"seconds": round(meter.seconds, 1), **own}
    if (joules := meter.joules) is not None:
        entry["joules"] = round(joules)
    entry |= {
        f"peak_{name}": max(sample[name] for sample in samples if name in sample)
        for name in columns
        if name != "seconds"
    }
    _write_machine(stage, entry)
    rows = ["\t".join(columns), *("\t".join(str(sample.get(name, "")) for name in columns) for sample in samples)]
    CURVES.mkdir(parents=True, exist_ok=True)
    (CURVES / f"{stage}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def device_name() -> str:
    """What computes here: the GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _write_machine(stage: str, entry: dict[str, Any]) -> None:
    import torch

    machine = json.loads(MACHINE.read_text(encoding="utf-8")) if MACHINE.exists() else {}
    machine["machine"] = {
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    }
    write_json(MACHINE, machine | {stage: entry})


def _memory(process: psutil.Process) -> dict[str, float]:
    """Resident memory of this process and its children (the probes of find_batch)."""
    resident = 0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            resident += member.memory_info().rss
    return {"process_memory_gib": round(resident / 2**30, 2)}


class Gpu:
    """NVML, asked directly: dvclive's monitor logs nothing at all where there is no NVIDIA driver.

    What cannot be measured is left out of the samples and costs nobody their training.
    """

    def __init__(self) -> None:
        import torch

        self.handle: Any = None
        if not torch.cuda.is_available():
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(
                torch.cuda.current_device()
            ).uuid  # its index may be another to NVML
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.nvml = pynvml
        except Exception as error:
            log.warning("GPU utilization and power are not measured: %s (nvidia-ml-py: requirements-gpu.txt)", error)

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        if self.handle is None:
            return None
        with suppress(self.nvml.NVMLError):
            return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        return None

    def read(self) -> dict[str, float]:
        if self.handle is None:
            return {}
        readings: dict[str, Callable[[], float]] = {
            "gpu_memory_gib": lambda: round(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used / 2**30, 2),
            "gpu_utilization_percent": lambda: self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu,
            "gpu_power_w": lambda: round(self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000),
        }
        values = {}
        for name, reading in readings.items():
            with suppress(self.nvml.NVMLError):  # not every GPU, and no MIG slice, answers every question
                values[name] = reading()
        return values


@functools.cache
def this_gpu() -> Gpu:
    """One for the process: what cannot be measured is said once."""
    return Gpu()
