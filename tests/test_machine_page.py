"""reports/machine.html."""

import pytest
from example_run import write_machine
from helpers import REPOSITORY

from pdf2lora.params import read_params
from pdf2lora.report.machine import Measurements, machine_figures, read_measurements, render_machine


@pytest.fixture
def params():
    return read_params(REPOSITORY / "params.yaml")


def test_has_the_numbers_and_curves_of_each_stage(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    write_machine(tmp_path)

    page = render_machine(read_measurements(), params)

    assert "<tr><td>tokens/s</td><td>34,567</td><td>–</td></tr>" in page
    assert "<tr><td>mean GPU utilization, %</td><td>90</td><td>–</td></tr>" in page
    assert page.count("<svg") == 3
    assert "This machine has no GPU" not in page


def test_names_a_missing_gpu(params):
    page = render_machine(Measurements({"gpu": None}, {"train": {"seconds": 1.0}}, {}), params)

    assert "This machine has no GPU" in page
    assert "GPU utilization" not in page


def test_a_machine_without_measurements(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)

    assert "No stage ran on this machine" in render_machine(read_measurements(), params)


def test_a_stage_of_a_few_seconds_has_no_curve():
    assert machine_figures({"sample": {"seconds": [0.0, 1.0], "process_memory_gib": [1.0, 1.0]}}) == {}
