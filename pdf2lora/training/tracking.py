"""The records of a training: dvclive's curves, the log file, a progress bar and, on request, accelerate's trackers.

metrics/train has the numbers that a repeated run gives again: losses, learning rates, the peak of allocated GPU memory.
It is an output of the pipeline: the last values are in git, the curves in DVC's cache. runtime/monitor.py writes the
numbers of one machine.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pdf2lora.errors import InputError
from pdf2lora.evaluation.rounding import rounded
from pdf2lora.params import Params
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.scratch import project_root

Entry = dict[str, float]  # one log entry: step, and values by the names of their curves

log = logging.getLogger("train")


def log_to_file(folder: Path) -> Path:
    """Writes log records to logs/training_<timestamp>.log. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"training_{datetime.now():%Y%m%d_%H%M%S}.log"
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    return file


def require_trackers(names: Sequence[str]) -> None:
    """Raises InputError if the package of a tracker is not installed."""
    for name in names:
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # no origin: only a folder of this name, which trackers make
            raise InputError(
                f"train.report_to: the package of tracker {name!r} is not installed. Install it with "
                f"pip install {name}, or choose none."
            )


class Trackers:
    """accelerate's trackers in train.report_to. The configuration of their run is the whole of params.yaml.

    The run has the name of the DVC experiment; without one, the names of corpus and model. Its files are in the main
    checkout, because DVC removes the temporary copy of `dvc exp run --temp`.
    """

    def __init__(self, params: Params, names: Sequence[str]):
        import pandas as pd
        from accelerate import Accelerator

        run = os.environ.get("DVC_EXP_NAME", f"{params.corpus} on {params.model}")
        project = os.environ.get("WANDB_PROJECT", "pdf2lora")
        folder = project_root() / "logs" / f"{datetime.now():%Y%m%d_%H%M%S} {run}"  # TensorBoard shows this name
        own: dict[str, dict[str, Any]] = {
            "wandb": {
                "name": os.environ.get("WANDB_NAME", run),
                "dir": os.environ.get("WANDB_DIR", str(project_root())),
            },
            "mlflow": {"run_name": run},
            "trackio": {"name": run},
        }
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(names), project_dir=str(folder))
        (settings,) = pd.json_normalize(params.model_dump()).to_dict("records")  # {"lora.r": 8, ...}
        # Lists become text, because some trackers do not support them.
        config = {key: value if isinstance(value, str | int | float) else str(value) for key, value in settings.items()}
        try:
            self.accelerator.init_trackers(project, config, {name: own[name] for name in names if name in own})
        except Exception as error:  # each tracker raises different exceptions
            raise InputError(
                f"train.report_to: {', '.join(names)} cannot start a run ({' '.join(str(error).split())[:300]}). "
                "Log in (wandb login), work offline (WANDB_MODE=offline), or choose none."
            ) from error

    def log(self, entry: Entry) -> None:
        values = {name: value for name, value in entry.items() if name != "step"}
        for tracker in list(self.accelerator.trackers):
            self._call(tracker, partial(tracker.log, values, step=int(entry["step"])))

    def end(self) -> None:
        """Not by Accelerator.end_training, which also destroys the process group."""
        for tracker in list(self.accelerator.trackers):
            self._call(tracker, tracker.finish)

    def _call(self, tracker: Any, method: Callable[[], None]) -> None:
        """Calls a method of a tracker. Gives up a tracker that fails, because its server must not end a training."""
        try:
            method()
        except Exception as error:  # each tracker raises different exceptions
            self.accelerator.trackers.remove(tracker)
            text = " ".join(str(error).split())[:300]
            print(f"train: warning: {tracker.name} failed ({text}) and gets no more entries", flush=True)


class Tracker:
    """Writes log entries in the main process, and measures the time of steps.

    dvclive's own callbacks are not used: they rewrite dvc.yaml, and after a resume they lack the earlier steps, because
    DVC removes the outputs of a stage before it runs. start() writes the history of the checkpoint again.
    """

    def __init__(self, folder: Path, processes: Processes, trackers: Trackers | None, *, tokens_per_step: float):
        self.is_main = processes.is_main
        self.trackers = trackers
        self.tokens_per_step = tokens_per_step
        self.live: Any = None
        if self.is_main:
            from dvclive import Live  # imports pandas, which only the main process of train needs

            self.live = Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        self.progress: Any = None
        self.last_log = (0, 0.0)  # step, seconds
        self.step_starts: list[float] = []
        self.first_step_at = 0.0  # seconds since the epoch

    def start(self, history: Sequence[Entry], step: int, num_steps: int) -> None:
        """history: the entries up to `step`, from the checkpoint."""
        for entry in history:
            self._write(entry)
        self.progress = tqdm(
            desc="train", total=num_steps, initial=step, unit="step", disable=None if self.is_main else True
        )
        self.last_log = (step, time.monotonic())

    def log(self, history: list[Entry], entry: Entry) -> None:
        """Adds an entry to the history and writes it."""
        if torch.cuda.is_available():
            entry["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        history.append(entry)
        self._write(entry)
        if self.trackers:
            self.trackers.log(entry)
        log.info("step %d %s", entry["step"], {name: value for name, value in entry.items() if name != "step"})
        self._show_progress(entry)

    def begin_step(self) -> None:
        self.first_step_at = self.first_step_at or time.time()
        self.step_starts.append(time.monotonic())

    def end_step(self) -> None:
        self.progress.update()

    def end(
        self, kept_step: int | None = None, replay_share: float | None = None, planned_steps: int | None = None
    ) -> None:
        """Writes the last entries of metrics/train/metrics.json.

        kept_step: the step whose adapter train kept, if it is not the last one.
        replay_share: the share of the training tokens that were replay text, if there was any.
        planned_steps: of the training, if early stopping ended it.
        """
        self.progress.close()
        if self.live:
            if kept_step is not None:
                self.live.summary["kept_step"] = kept_step
            if replay_share is not None:
                self.live.summary["replay_share"] = rounded(replay_share)
            if planned_steps is not None:
                self.live.summary["planned_steps"] = planned_steps
            self.live.make_summary()
            self.live.end()
        if self.trackers:
            self.trackers.end()

    @property
    def seconds(self) -> float:
        """Time since the first step began."""
        return time.time() - self.first_step_at

    @property
    def median_step_s(self) -> float | None:
        """Median time of a step without the first one, which compiles kernels. Few steps validate or save."""
        steps = np.diff(self.step_starts[1:])
        return float(np.median(steps)) if len(steps) else None

    def _show_progress(self, entry: Entry) -> None:
        postfix: dict[str, str] = {
            name: f"{entry[name]:.3g}" for name in ("train/loss", "validation/loss") if name in entry
        }
        (step, seconds), now = self.last_log, time.monotonic()
        if "train/loss" in entry and entry["step"] > step:
            postfix["tokens/s"] = f"{(entry['step'] - step) * self.tokens_per_step / (now - seconds):,.0f}"
        if "gpu_memory_gib" in entry:
            postfix["GiB"] = f"{entry['gpu_memory_gib']:.1f}"
        self.progress.set_postfix(postfix)
        self.last_log = (int(entry["step"]), now)

    def _write(self, entry: Entry) -> None:
        if self.live is None:
            return
        self.live.step = int(entry["step"])
        for name, value in sorted(entry.items()):
            if name == "step":
                continue
            self.live.log_metric(name, rounded(value))
            if name.endswith("/loss"):
                with np.errstate(over="ignore"):  # infinite for a loss above 709
                    self.live.log_metric(name.replace("loss", "perplexity"), rounded(float(np.exp(value))))
        self.live.make_summary()
