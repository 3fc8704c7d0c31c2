"""Warnings of the report."""

import dataclasses

import pytest
from example_run import write_run
from helpers import REPOSITORY

from pdf2lora.params import read_params
from pdf2lora.report.results import read_results
from pdf2lora.report.warnings import run_warnings

STEPS = [float(step) for step in range(1, 21)]
COSINE = [0.5, *(1 - step / 20 for step in range(19))]


@pytest.fixture
def warn(tmp_path, monkeypatch):
    """The warnings of an ordinary run with changes: warn(evaluation={...}, rates=[...])."""
    monkeypatch.chdir(tmp_path)
    results = read_results(write_run(tmp_path) / "models/source/demo", [])
    params = read_params(REPOSITORY / "params.yaml")

    def make(evaluation=None, rates=COSINE, split=None, **changes):
        return run_warnings(
            dataclasses.replace(
                results,
                evaluation=results.evaluation | (evaluation or {}),
                split=results.split | (split or {}),
                curves={"learning_rate": (STEPS[: len(rates)], rates)},
                **changes,
            ),
            params,
        )

    return make


def share(value, half_width=0.01):
    return {"share": value, "low_95": value - half_width, "high_95": value + half_width}


def test_an_ordinary_run_has_none(warn):
    assert warn() == []


def test_a_constant_rate_after_the_warm_up_is_no_problem(warn):
    assert warn(rates=[0.5, *[1.0] * 11]) == []


@pytest.mark.parametrize(("kept_step", "is_untrained"), [(2, False), (0, True)])
def test_early_stopping_is_named(warn, kept_step, is_untrained):
    [warning] = warn(rates=COSINE[:4], planned_steps=20, kept_step=kept_step)

    assert warning.startswith("Early stopping ended the training after step 4 of 20.")
    assert ("No validation was better" in warning) == is_untrained


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": {"interval_note": "no interval: 1 document"}}, "No interval: 1 document."),
        ({"evaluation": {"improvement": share(0.005)}}, "contains zero"),
        ({"evaluation": {"improvement": share(-0.1)}}, "makes the model worse"),
        ({"evaluation": {"quantization_cost": share(0.22)}}, "4 bits raise the perplexity of the base by 22.0%"),
        ({"evaluation": {"general": {"improvement": share(-0.11)}}}, "general text by 11.0%"),
        ({"split": {"test_13grams_in_train": 0.2}}, "20.0% of the test documents"),
        ({"rates": [0.0]}, "The learning rate was 0 in all 1 steps"),
        ({"rates": [0.1 * step for step in range(20)]}, "The warm-up takes all 20 steps"),
        ({"rates": [0.5, 1.0, 0.5]}, "The run has 3 optimizer steps"),
    ],
)
def test_an_unusual_run_has_a_warning_with_its_numbers(warn, changes, words):
    (warning,) = warn(**changes)

    assert words in warning
