"""Warnings about schedules, compared with the learning rates of transformers' schedules."""

import pytest
import torch
from tiny_llama import TRAIN, changed
from transformers import TrainingArguments, get_scheduler

from pdf2lora.training.data_order import DataOrder
from pdf2lora.training.schedule import num_warmup_steps, schedule_warnings


def warnings_of(num_sequences, effective_batch=4, **changes):
    return schedule_warnings(changed(TRAIN, **changes), num_sequences=num_sequences, effective_batch=effective_batch)


def highest_rate(num_sequences, effective_batch=4, **changes):
    """The highest learning rate of all steps, as a share of train.learning_rate."""
    train = changed(TRAIN, **changes)
    num_steps = DataOrder(num_sequences, effective_batch, train.num_train_epochs, 0).num_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    num_warmup = num_warmup_steps(train.warmup_steps, num_steps)
    scheduler = get_scheduler(train.lr_scheduler_type, optimizer, num_warmup, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return max(rates)


@pytest.mark.parametrize("warmup_steps", [0, 0.0, 0.05, 0.25, 0.999, 1, 1.0, 7, 7.0])
@pytest.mark.parametrize("num_steps", [1, 30, 100])
def test_warmup_steps_equal_those_of_the_hugging_face_trainer(warmup_steps: float, num_steps: int) -> None:
    arguments = TrainingArguments(output_dir="unused", warmup_steps=warmup_steps, report_to=[])

    assert num_warmup_steps(warmup_steps, num_steps) == arguments.get_warmup_steps(num_steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_training_with_learning_rate_0_only(schedule):
    (warning,) = warnings_of(4, lr_scheduler_type=schedule, warmup_steps=0.05)

    assert warning.startswith("the training has 1 optimizer step, and its learning rate is 0")
    assert "warmup_steps (0.05)" in warning
    assert highest_rate(4, lr_scheduler_type=schedule, warmup_steps=0.05) == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup_steps", [5, 10, 200])
def test_a_warm_up_of_the_whole_training(schedule, warmup_steps):
    (warning,) = warnings_of(20, lr_scheduler_type=schedule, warmup_steps=warmup_steps)

    rate = highest_rate(20, lr_scheduler_type=schedule, warmup_steps=warmup_steps)
    assert f"train.warmup_steps is {warmup_steps} and the training has 5 optimizer steps" in warning
    assert f"does not get above {rate:.0%} of train.learning_rate" in warning
    assert rate < 1


def test_a_batch_above_the_number_of_sequences():
    (warning,) = warnings_of(22, 64, num_train_epochs=3, warmup_steps=0)

    assert "train.effective_batch is 64 and there are 22 training sequences" in warning


@pytest.mark.parametrize("changes", [{"warmup_steps": 4}, {"warmup_steps": 0.05}, {"warmup_steps": 0}])
def test_an_ordinary_training_has_no_warning(changes):
    assert warnings_of(20, **changes) == []
    assert highest_rate(20, **changes) == 1


def test_a_constant_rate_has_no_warm_up():
    assert warnings_of(4, lr_scheduler_type="constant", warmup_steps=0.5) == []
    assert highest_rate(4, lr_scheduler_type="constant", warmup_steps=0.5) == 1


def test_a_training_without_sequences_has_no_warning():
    assert warnings_of(0) == []
