"""How far a training is, and its log entries.

With a CUDA graph, an entry is written while the GPU computes the next step.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pdf2lora.errors import InputError
from pdf2lora.training.optimizer import FlatParameters
from pdf2lora.training.tracking import Entry, Tracker


@dataclass
class Progress:
    """The part of a checkpoint that is neither parameters nor optimizer state."""

    step: int = 0  # optimizer steps that are done
    loss_sum: float = 0.0  # since the last log entry
    steps_in_sum: int = 0
    best_loss: float = math.inf  # of the validation documents
    best_step: int = 0
    validations_without_best: int = 0
    history: list[Entry] = field(default_factory=list)


class StepNumbers:
    """Loss, norm of the gradient and number of stop requests of one step, on their way from the GPU to the host."""

    def __init__(self, step: int, learning_rate: float, parameters: FlatParameters, norm: Tensor):
        """step: the number of steps that are done. norm: a scalar."""
        self.step, self.learning_rate = step, learning_rate
        numbers = torch.stack([parameters.loss, norm, parameters.stop_requests])
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.is_ready = torch.cuda.Event() if numbers.is_cuda else None
        if self.is_ready:
            self.is_ready.record()

    def read(self) -> list[float]:
        """Waits for this step only, not for later ones."""
        if self.is_ready:
            self.is_ready.synchronize()
        return self.numbers.tolist()


class StepLog:
    """Writes an entry every `logging_steps` steps, with the mean loss since the last one."""

    def __init__(self, progress: Progress, tracker: Tracker, logging_steps: int):
        self.progress, self.tracker, self.logging_steps = progress, tracker, logging_steps
        self.unread: deque[StepNumbers] = deque()
        self.stop_requests = 0.0
        """Processes that had received a stop signal at the last step that was read. All processes have this number."""

    def add(self, numbers: StepNumbers, *, read_now: bool) -> None:
        """Reads the steps before this one, and with read_now this one too."""
        self.unread.append(numbers)
        self._read(0 if read_now else 1)

    def read_all(self) -> None:
        """Waits for the GPU."""
        self._read(0)

    def finish(self, last: StepNumbers) -> None:
        """Writes the entry of the last steps, also if logging_steps does not divide the number of steps."""
        self.read_all()
        if self.progress.steps_in_sum:
            self._write(last)

    def _read(self, num_left: int) -> None:
        """Raises InputError if the loss of a step is not finite."""
        while len(self.unread) > num_left:
            numbers = self.unread.popleft()
            loss, _, self.stop_requests = numbers.read()
            if not math.isfinite(loss):
                raise InputError(
                    f"train: the loss of step {numbers.step} is {loss}. Use a smaller train.learning_rate; on a GPU "
                    "without bfloat16, use compute.compute_dtype=float32."
                )
            self.progress.loss_sum += loss
            self.progress.steps_in_sum += 1
            if numbers.step == 1 or numbers.step % self.logging_steps == 0:
                self._write(numbers)

    def _write(self, numbers: StepNumbers) -> None:
        progress = self.progress
        entry = {
            "step": numbers.step,
            "train/loss": progress.loss_sum / progress.steps_in_sum,
            "learning_rate": numbers.learning_rate,
            "gradient_norm": numbers.read()[1],
        }
        self.tracker.log(progress.history, entry)
        progress.loss_sum, progress.steps_in_sum = 0.0, 0
