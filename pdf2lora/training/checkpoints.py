"""Checkpoints that can be trusted: which one a training goes on from, and one more when it is told to stop.

A checkpoint has a manifest (manifest.py), written when all else is written. Training goes on from the newest one that
holds what its manifest says.
"""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from pdf2lora.runtime.manifest import find_damage, read_manifest, write_manifest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def latest_valid(folder: Path) -> str | None:
    """The newest whole checkpoint-<step> of the folder; one that cannot be used is removed, and a line says so.

    None: training starts from the base model.
    """
    faults = {}
    chosen = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        wrong = _fault(checkpoint)
        if wrong is None:
            chosen = checkpoint
            break
        faults[checkpoint] = wrong
    for checkpoint, wrong in faults.items():
        goes_on_from = chosen.name if chosen else "the base model"
        print(f"train: {checkpoint.name} is not used, {wrong}; goes on from {goes_on_from}", flush=True)
        shutil.rmtree(checkpoint)
    return str(chosen) if chosen else None


def step_of(checkpoint: Path | str | None) -> int:
    return int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0


def _fault(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint, in words; None = it can."""
    if wrong := find_damage(checkpoint):
        return wrong
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= state["max_steps"] and state["epoch"] % 1:
        return "it is the last one and the Trainer (5.23) would add a step to it in an epoch that is cut short"
    return None


class CheckpointKeeper(TrainerCallback):  # type: ignore[misc]
    """Writes each checkpoint's manifest, and saves one more on SIGTERM, Ctrl-C or the end of the terminal.

    The manifest also holds the sum of the losses since the last log entry, which the Trainer keeps in memory alone: the
    curve of a resumed run has the same points wherever the steps of `logging_steps` and the checkpoints fall.

    While it saves, a second Ctrl-C ends the process at once; SIGTERM and SIGHUP do not. They follow the first signal
    where that went to all processes: dvc ends by it, and so the watch of orphans.py sends another.
    """

    def __init__(self, trainer: Trainer, resumes_from: str | None):
        self.trainer, self.resumes_from = trainer, resumes_from
        self.received: signal.Signals | None = None
        self.handlers: dict[signal.Signals, Any] = {}
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: the end of the terminal is no end
                self.handlers[number] = signal.signal(number, self._stop)
        if self.resumes_from:
            manifest = read_manifest(Path(self.resumes_from))
            self.trainer._tr_loss += manifest["loss_since_log"]
            self.trainer._globalstep_last_logged = manifest["logged_step"]

    def _stop(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        for other, before in self.handlers.items():
            signal.signal(other, before if other == signal.SIGINT else signal.SIG_IGN)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_manifest(
            Path(args.output_dir) / f"checkpoint-{state.global_step}",
            loss_since_log=self.trainer._tr_loss.item(),
            logged_step=self.trainer._globalstep_last_logged,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def exit_if_interrupted(self) -> None:
        """After train(): ends the process, exit status 1, where a signal stopped the training before its last step."""
        if self.received and self.trainer.state.global_step < self.trainer.state.max_steps:
            sys.exit(
                f"train: ended by {self.received.name} after step {self.trainer.state.global_step}, checkpoint saved; "
                "dvc repro goes on from there"
            )
