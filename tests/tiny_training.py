"""A training of some steps on the tiny Llama, with the loop of the train stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_llama import BOS, COMPUTE, LORA, QUANTIZATION, TRAIN, changed, random_sequences, trainable

from pdf2lora.model.loading import add_lora, load_base
from pdf2lora.params import Compute, Lora, Placement, Train
from pdf2lora.runtime.distributed import Processes
from pdf2lora.tokens import Sequences, Window, windows
from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.interrupt import Interrupt
from pdf2lora.training.loop import BatchPlan, Learner, TrainingResult, train
from pdf2lora.training.tracking import Entry, Tracker

NUM_SEQUENCES = 8
NO_DROPOUT = changed(LORA, lora_dropout=0.0)
VALIDATION_WINDOWS = windows(map(np.arange, (50, 9, 70)), bos=BOS, seq_length=32, stride=32)


class Recorder(Tracker):
    """Keeps the log entries and writes nothing. before_step receives the number of steps that are done."""

    def __init__(self, before_step: Callable[[int], None] = lambda step: None):
        self.is_main, self.live, self.trackers = False, None, None
        self.tokens_per_step, self.last_log = 1, (0, 0.0)
        self.step_starts, self.first_step_at = [], 0.0
        self.before_step = before_step
        self.history: list[Entry] = []

    def start(self, history: Sequence[Entry], step: int, num_steps: int) -> None:
        super().start(history, step, num_steps)
        self.history, self.step = list(history), step

    def log(self, history: list[Entry], entry: Entry) -> None:
        super().log(history, entry)
        self.history = history

    def begin_step(self) -> None:
        self.before_step(self.step)
        super().begin_step()
        self.step += 1


@dataclass
class Training:
    learner: Learner
    result: TrainingResult
    history: list[Entry]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return trainable(self.learner.model)

    def values(self, name: str) -> list[float]:
        """The values of a curve, without its steps."""
        return [entry[name] for entry in self.history if name in entry]


def build_learner(
    base: Path,
    *,
    num_steps: int = 4,
    train: Train = TRAIN,
    lora: Lora = LORA,
    compute: Compute = COMPUTE,
    bits: int = 4,
    kernels: str = "reference",
    gradient_checkpointing: str = "full",
    per_device_batch: int = 2,
    processes: Processes | None = None,
    placement: Placement = "gpu",
) -> Learner:
    """A learner on a new model, as job.py builds it."""
    model = load_base(base, changed(QUANTIZATION, bits=bits), compute, placement=placement)
    torch.manual_seed(train.seed)
    effective_batch = train.effective_batch
    assert effective_batch != "auto"
    return Learner(
        add_lora(model, lora),
        train=train,
        compute=compute,
        plan=BatchPlan(kernels, gradient_checkpointing, per_device_batch, effective_batch),
        num_steps=num_steps,
        processes=processes or Processes(),
    )


def run_training(
    base: Path,
    checkpoints: Path,
    *,
    train_settings: Train = TRAIN,
    sequences: Sequences | None = None,
    validation_windows: Sequence[Window] = VALIDATION_WINDOWS,
    before_step: Callable[[int], None] = lambda step: None,
    tracker: Tracker | None = None,
    **learner_settings: Any,
) -> Training:
    """Trains a new model, from the latest valid checkpoint of the folder if there is one."""
    sequences = random_sequences(NUM_SEQUENCES) if sequences is None else sequences
    effective_batch = train_settings.effective_batch
    assert effective_batch != "auto"
    order = DataOrder(len(sequences), effective_batch, train_settings.num_train_epochs, train_settings.seed)
    learner = build_learner(base, num_steps=order.num_steps, train=train_settings, **learner_settings)
    recorder = Recorder(before_step)
    with Interrupt() as interrupt:
        result = train(
            learner,
            sequences,
            order=order,
            validation_windows=validation_windows,
            checkpoints=checkpoints,
            tracker=tracker or recorder,
            interrupt=interrupt,
        )
    return Training(learner, result, recorder.history)
