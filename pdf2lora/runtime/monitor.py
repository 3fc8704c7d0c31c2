"""Measurements of one machine: seconds, process memory, GPU memory, utilization and power.

Two runs never measure the same numbers. Therefore metrics/machine.json and metrics/machine/ are not outputs of a stage.

torch is imported inside functions: find_batch measures in a child process and imports torch while the child works.
"""

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
from typing import Any

import psutil

from pdf2lora.paths import MACHINE, MACHINE_CURVES
from pdf2lora.runtime.files import write_json

SAMPLE_S = 1.0

log = logging.getLogger(__name__)


class ResourceMonitor:
    """Samples memory and GPU sensors every SAMPLE_S seconds in a thread, until stop()."""

    def __init__(self) -> None:
        self.gpu = Gpu()  # in this thread, because it imports torch
        self.started = time.monotonic()
        self.samples: list[dict[str, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Seconds since the monitor was created."""
        return time.monotonic() - self.started

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def peaks(self) -> dict[str, float]:
        """The maximum of each sampled quantity, as peak_<name>."""
        return {
            f"peak_{name}": max(sample[name] for sample in self.samples if name in sample)
            for name in self._columns()
            if name != "seconds"
        }

    def to_tsv(self) -> str:
        """One row per sample, one column per quantity. A cell is empty if its sensor did not answer."""
        columns = self._columns()
        rows = [columns, *([str(sample.get(name, "")) for name in columns] for sample in self.samples)]
        return "\n".join("\t".join(row) for row in rows) + "\n"

    def _run(self) -> None:
        process = psutil.Process()
        while True:
            self.samples.append({"seconds": round(self.seconds, 1), **_process_memory(process), **self.gpu.read()})
            if self._stopped.wait(SAMPLE_S):
                return

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(self.samples)))


@contextmanager
def machine_metrics(stage: str) -> Iterator[dict[str, Any]]:
    """Monitors the block. Yields a dict to which the block can add its own numbers.

    Writes the stage's entry of metrics/machine.json and metrics/machine/<stage>.tsv, unless the block raises.
    """
    metrics: dict[str, Any] = {}
    monitor = ResourceMonitor()
    try:
        yield metrics
    finally:
        monitor.stop()
    _write_entry(stage, {"seconds": round(monitor.seconds, 1), **metrics, **monitor.peaks()})
    MACHINE_CURVES.mkdir(parents=True, exist_ok=True)
    (MACHINE_CURVES / f"{stage}.tsv").write_text(monitor.to_tsv(), encoding="utf-8")


def device_name() -> str:
    """The name of the GPU, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class Gpu:
    """Reads the sensors of this process's GPU with NVML. A sensor that does not answer is left out.

    dvclive's monitor is not used: it prints a traceback on a machine without an NVIDIA driver.
    """

    def __init__(self) -> None:
        import torch

        self.handle: Any = None
        if not torch.cuda.is_available():
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # The UUID, because NVML may number the GPUs in another order than CUDA.
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.nvml = pynvml
        except Exception as error:
            log.warning("GPU utilization and power are not measured: %s (nvidia-ml-py: requirements-gpu.txt)", error)

    def read(self) -> dict[str, float]:
        """Current values of all sensors that answer; empty without a GPU."""
        if self.handle is None:
            return {}
        sensors: dict[str, Callable[[], float]] = {
            "gpu_memory_gib": lambda: round(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used / 2**30, 2),
            "gpu_utilization_percent": lambda: self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu,
            "gpu_power_w": lambda: round(self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000),
        }
        values = {}
        for name, read_sensor in sensors.items():
            with suppress(self.nvml.NVMLError):  # some GPUs, and all MIG slices, lack some sensors
                values[name] = read_sensor()
        return values


def _process_memory(process: psutil.Process) -> dict[str, float]:
    """Resident memory of this process and its children, which include find_batch's probes."""
    resident_bytes = 0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it ended after it was listed
            resident_bytes += member.memory_info().rss
    return {"process_memory_gib": round(resident_bytes / 2**30, 2)}


def _write_entry(stage: str, entry: dict[str, Any]) -> None:
    """Replaces the stage's entry and the description of the machine."""
    import torch

    metrics = json.loads(MACHINE.read_text(encoding="utf-8")) if MACHINE.exists() else {}
    metrics["machine"] = {
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    }
    write_json(MACHINE, metrics | {stage: entry})
