"""Estimates of steps, time and memory."""

import pytest
from test_model_shape import LLAMA_3B

from pdf2lora.params import read_params
from pdf2lora.preflight.environment import Gpu
from pdf2lora.preflight.forecast import format_duration, memory_estimate, schedule_notes, step_estimate, time_estimate
from pdf2lora.preflight.previous_run import PreviousRun

T4 = Gpu("Tesla T4", "570.10", 15.0, 7.5)
H100 = Gpu("NVIDIA H100 80GB HBM3", "570.10", 79.6, 9.0)


@pytest.fixture
def params(write_params):
    return read_params(write_params())


@pytest.fixture
def no_run(params):
    return PreviousRun(params, stages={}, machine={}, batch={})


@pytest.mark.parametrize(
    ("num_sequences", "batch", "epochs", "expected"), [(167, 4, 1, 42), (167, 4, 0.1, 5), (8, 8, 3, 3)]
)
def test_steps(no_run, write_params, num_sequences, batch, epochs, expected):
    params = read_params(write_params({"train.effective_batch": batch, "train.num_train_epochs": epochs}))

    assert step_estimate(no_run, params, num_sequences).value == f"{expected} optimizer steps"


def test_a_schedule_warning_is_a_note(no_run, write_params):
    params = read_params(write_params({"train.effective_batch": 64, "train.warmup_steps": 10}))

    batch, untrained = schedule_notes(no_run, params, 22)

    assert (batch.level, batch.subject) == ("note", "training")
    assert "there are 22 training sequences" in batch.text
    assert "the adapter stays untrained" in untrained.text
    assert schedule_notes(no_run, params, 64 * 30) == []


def test_the_batch_of_auto_is_that_of_the_last_search(params, no_run, write_params):
    params = read_params(write_params({"train.effective_batch": "auto"}))
    searched = PreviousRun(params, stages={}, machine={}, batch={"effective_batch": 64})

    assert schedule_notes(no_run, params, 22) == []
    assert len(schedule_notes(searched, params, 22)) == 2


def test_the_time_on_an_unknown_gpu_is_unknown(no_run, params):
    estimate = time_estimate(no_run, params, LLAMA_3B, [T4], 1000)

    assert (estimate.source, estimate.value) == ("unknown", "-")


def test_the_time_on_a_known_gpu_follows_from_its_peak(no_run, params):
    estimate = time_estimate(no_run, params, LLAMA_3B, [H100], 10**6)

    flop = 6 * LLAMA_3B.num_parameters * 10**6
    assert (estimate.source, estimate.value) == ("estimated", f"{flop / (0.3 * 989e12):.0f} s")


def test_memory_without_a_batch_search_is_base_and_adapter(no_run, params):
    estimate = memory_estimate(no_run, params, LLAMA_3B)

    assert estimate.source == "computed"
    assert estimate.value == "2.13 GiB plus the activations"


@pytest.mark.parametrize(("duration_s", "text"), [(0.1, "1 s"), (89, "89 s"), (600, "10 minutes"), (7200, "2.0 hours")])
def test_durations(duration_s, text):
    assert format_duration(duration_s) == text
