"""What is written down while a model trains: dvclive's metrics, the log file, what the machine did.

Two kinds of numbers are kept apart. metrics/train holds what a repeated run gives again: losses, learning rates, the
peak of allocated GPU memory; it is an output of the pipeline, in git and in dvc.lock. metrics/machine.json and the
curves beside it hold seconds, throughput, power and the like, which no two runs share; they are nobody's output.
"""

import json
import logging
import math
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

import psutil
import torch
from dvclive import Live
from tqdm import tqdm
from transformers import TrainerCallback

from pdf2lora.runtime import write_json

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

    def __init__(self, folder: Path):
        self.live = Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        self.log = logging.getLogger("train")
        self.progress: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:
            self._write(entry, entry["step"])
        self.progress = tqdm(desc="train", total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if torch.cuda.is_available():
            state.log_history[-1]["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._write(state.log_history[-1], state.global_step)
        self.log.info("step %d %s", state.global_step, {k: v for k, v in logs.items() if k in METRIC_NAMES})
        self.progress.set_postfix({k: f"{v:.3g}" for k, v in logs.items() if k in ("loss", "eval_loss")})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.close()
        self.live.end()

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

    def sample() -> None:
        process, gpu = psutil.Process(), _Gpu()
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
    entry = {"seconds": round(time.monotonic() - started, 1), **own}
    names = [name for name in dict.fromkeys(chain.from_iterable(samples)) if name != "seconds"]
    entry |= {f"peak_{name}": max(sample[name] for sample in samples if name in sample) for name in names}
    _write_machine(stage, entry, samples)


def _write_machine(stage: str, entry: dict[str, Any], samples: list[dict[str, float]]) -> None:
    machine = json.loads(MACHINE.read_text(encoding="utf-8")) if MACHINE.exists() else {}
    machine["machine"] = {
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    }
    write_json(MACHINE, machine | {stage: entry})
    columns = list(dict.fromkeys(chain.from_iterable(samples)))
    rows = ["\t".join(columns), *("\t".join(str(sample.get(name, "")) for name in columns) for sample in samples)]
    CURVES.mkdir(parents=True, exist_ok=True)
    (CURVES / f"{stage}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


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
