"""What is written down while a model trains: dvclive's metrics, the log file, what the machine did.

Two kinds of numbers are kept apart. metrics/train holds what a repeated run gives again: losses, learning rates, the
peak of allocated GPU memory; it is an output of the pipeline, in git and in dvc.lock. metrics/machine.json and the
curves beside it hold seconds, throughput, power and the like, which no two runs share; they are nobody's output.
"""

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from dvclive import Live
from tqdm import tqdm
from transformers import LlamaConfig, TrainerCallback

from pdf2lora.runtime import write_json
from pdf2lora.throughput import model_flops_utilization

MACHINE = Path("metrics/machine.json")
CURVES = Path("metrics/machine")
SAMPLE_S = 1.0

log = logging.getLogger(__name__)

# The Trainer's names for what it logs -> ours, which are also the names of the plots' files.
METRIC_NAMES = {
    "loss": "train/loss",
    "eval_loss": "validation/loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
}


def log_to_file(folder: Path) -> Path:
    """Sends what is logged to logs/training_<timestamp>.log as well; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    return file


class DvcliveCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the Trainer's log entries to metrics/train by dvclive, with a progress bar and a line in the log for each.

    dvclive's own callback is not used: it rewrites dvc.yaml, and it loses the steps before a checkpoint that training
    resumes from, since DVC removes a stage's outputs before it runs. Here those steps are written again from the
    checkpoint's log history.
    """

    def __init__(self, folder: Path, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.live = Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        self.log = logging.getLogger("train")
        self.progress: Any = None
        self.last_log = (0, 0.0)  # step, seconds
        self.step_starts: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:
            self._write(entry, entry["step"])
        self.progress = tqdm(desc="train", total=state.max_steps, initial=state.global_step, unit="step", disable=None)
        self.last_log = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if torch.cuda.is_available():
            state.log_history[-1]["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._write(state.log_history[-1], state.global_step)
        self.log.info("step %d %s", state.global_step, {k: v for k, v in logs.items() if k in METRIC_NAMES})
        self._show_progress(state, logs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_starts.append(time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.close()
        self.live.end()

    def throughput(self, config: LlamaConfig, seq_length: int) -> dict[str, float | None]:
        """Of the median training step, without the looks at the validation documents; and the GPU memory it took."""
        numbers: dict[str, float | None] = {}
        steps = np.diff(self.step_starts[1:])  # the first one compiles kernels
        if len(steps):
            tokens_per_s = self.tokens_per_step / float(np.median(steps))
            utilization = model_flops_utilization(tokens_per_s, config, seq_length, device_name())
            numbers["step_tokens_per_s"] = round(tokens_per_s)
            numbers["model_flops_utilization"] = utilization and round(utilization, 3)
        if torch.cuda.is_available():
            numbers["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            numbers["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        return numbers

    def _show_progress(self, state: Any, logs: dict[str, float]) -> None:
        """Loss, and on training steps the throughput since the last one that was logged, and GPU memory."""
        shown: dict[str, str] = {name: f"{logs[name]:.3g}" for name in ("loss", "eval_loss") if name in logs}
        (step, seconds), now = self.last_log, time.monotonic()
        if "loss" in logs and state.global_step > step:
            shown["tokens/s"] = f"{(state.global_step - step) * self.tokens_per_step / (now - seconds):,.0f}"
        if "gpu_memory_gib" in state.log_history[-1]:
            shown["GiB"] = f"{state.log_history[-1]['gpu_memory_gib']:.1f}"
        self.progress.set_postfix(shown)
        self.last_log = (state.global_step, now)

    def _write(self, entry: dict[str, float], step: int) -> None:
        self.live.step = step
        for name, value in sorted(entry.items()):  # as the history of a checkpoint comes back
            if name in METRIC_NAMES:
                self.live.log_metric(METRIC_NAMES[name], value)
            if name in ("loss", "eval_loss"):
                self.live.log_metric(METRIC_NAMES[name].replace("loss", "perplexity"), math.exp(value))
            if name == "gpu_memory_gib":
                self.live.log_metric(name, value)
        self.live.make_summary()


@contextmanager
def machine_metrics(stage: str) -> Iterator[dict[str, Any]]:
    """Samples memory, and a GPU's utilization and power, while the block runs; the block may add numbers of its own.

    Writes the stage's entry of metrics/machine.json and metrics/machine/<stage>.tsv.
    """
    samples: list[dict[str, float]] = []
    own: dict[str, Any] = {}
    finished = threading.Event()
    started = time.monotonic()
    gpu = _Gpu()
    joules = gpu.joules()

    def sample() -> None:
        process = psutil.Process()
        while True:
            samples.append({"seconds": round(time.monotonic() - started, 1), **_memory(process), **gpu.read()})
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
    entry = {"seconds": round(time.monotonic() - started, 1), **own}
    if joules is not None:
        entry["joules"] = round((gpu.joules() or joules) - joules)
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
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _write_machine(stage: str, entry: dict[str, Any]) -> None:
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


class _Gpu:
    """NVML, asked directly: dvclive's monitor logs nothing at all where there is no NVIDIA driver.

    What cannot be measured is left out of the samples and costs nobody their training.
    """

    def __init__(self) -> None:
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
