"""Warm-up steps, and warnings about schedules that probably do something else than the user expects."""

import math

from pdf2lora.params import Train
from pdf2lora.training.data_order import DataOrder

WITH_WARMUP = ("linear", "cosine", "constant_with_warmup")


def num_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """train.warmup_steps in optimizer steps: a value under 1 is a share of all steps, rounded up."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * num_steps)


def schedule_warnings(train: Train, *, num_sequences: int, effective_batch: int) -> list[str]:
    """One sentence for each problem, with numbers and remedy. An ordinary training has none.

    During the warm-up, step k (the first one is 0) has k / num_warmup of the full learning rate.
    """
    num_steps = DataOrder(num_sequences, effective_batch, train.num_train_epochs, train.seed).num_steps
    if num_steps == 0:
        return []
    num_warmup = num_warmup_steps(train.warmup_steps, num_steps) if train.lr_scheduler_type in WITH_WARMUP else 0
    steps = "1 optimizer step" if num_steps == 1 else f"{num_steps:,} optimizer steps"
    warnings = []
    if effective_batch > num_sequences:
        warnings.append(
            f"train.effective_batch is {effective_batch:,} and there are {num_sequences:,} training sequences: each "
            "epoch is one step with all sequences. Use a smaller effective_batch."
        )
    if num_warmup and num_steps == 1:
        warnings.append(
            f"the training has {steps}, and its learning rate is 0 because of train.warmup_steps "
            f"({train.warmup_steps:g}): the adapter stays untrained. Use more epochs, a smaller effective_batch, or "
            "warmup_steps 0."
        )
    elif num_warmup >= num_steps:
        warnings.append(
            f"train.warmup_steps is {train.warmup_steps:g} and the training has {steps}: the learning rate does not "
            f"get above {(num_steps - 1) / num_warmup:.0%} of train.learning_rate. Use fewer warm-up steps or more "
            "epochs."
        )
    return warnings
