"""What is written down while a model trains: dvclive's metrics, the log file and, if wanted, a run at Weights & Biases.

metrics/train holds what a repeated run gives again: losses, learning rates, the peak of allocated GPU memory; it is an
output of the pipeline, the last values in git and the curves in DVC's cache. What no two runs share is machine.py's.
"""

import logging
import math
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dvclive import Live
from tqdm import tqdm
from transformers import LlamaConfig, TrainerCallback

from pdf2lora.errors import InputError
from pdf2lora.params import Params
from pdf2lora.runtime.monitor import device_name
from pdf2lora.runtime.scratch import project_root
from pdf2lora.training.throughput import model_flops_utilization

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


def start_wandb(params: Params) -> None:
    """Starts a run at Weights & Biases, with all of params.yaml; transformers' callback then logs to it.

    Left to itself that callback would name the project huggingface and the run nothing, and would know its own settings
    alone. The run is called like the DVC experiment, outside of one like corpus and model. Its files are in the main
    checkout, since a temporary copy (`dvc exp run --temp`) is removed.

    Raises:
        InputError: nobody is logged in, or Weights & Biases cannot be reached.
    """
    import wandb

    name = os.environ.get("DVC_EXP_NAME", f"{params.corpus} on {params.model}")
    try:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pdf2lora"),
            name=os.environ.get("WANDB_NAME", name),
            dir=os.environ.get("WANDB_DIR", project_root()),
            config=params.model_dump(mode="json"),
        )
    except wandb.Error as error:
        raise InputError(
            f"train.report_to: 'wandb' cannot start a run ({error}); run wandb login, set WANDB_MODE=offline, or "
            "choose 'none'"
        ) from error


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
        self.first_step_at = 0.0  # seconds since the epoch

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
        self.first_step_at = self.first_step_at or time.time()
        self.step_starts.append(time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.close()
        self.live.end()

    def start_up(self, began: float) -> dict[str, float]:
        """seconds_to_first_step since `began`, of the epoch; nothing where no step was left to do."""
        return {"seconds_to_first_step": round(self.first_step_at - began, 1)} if self.first_step_at else {}

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
