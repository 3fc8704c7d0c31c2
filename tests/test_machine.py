import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pdf2lora.runtime import monitor as machine
from pdf2lora.runtime.monitor import Meter, machine_metrics


@pytest.fixture
def many_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "SAMPLE_S", 0.02)
    return tmp_path


def test_machine_metrics_of_two_stages_merge(many_samples):
    with machine_metrics("find_batch"):
        time.sleep(0.1)
    with machine_metrics("train") as entry:
        entry["tokens_per_s"] = 123

    metrics = json.loads((many_samples / "metrics/machine.json").read_text())
    assert metrics.keys() == {"machine", "find_batch", "train"}
    assert {"processor", "gpu", "python", "torch", "transformers", "peft", "bitsandbytes"} < metrics["machine"].keys()
    assert metrics["find_batch"]["seconds"] >= 0.1
    assert metrics["train"]["tokens_per_s"] == 123
    assert metrics["train"]["peak_process_memory_gib"] > 0.05


def test_machine_metrics_of_a_stage_that_runs_again_replace_its_own(many_samples):
    for tokens_per_s in (1, 2):
        with machine_metrics("train") as entry:
            entry["tokens_per_s"] = tokens_per_s

    assert json.loads((many_samples / "metrics/machine.json").read_text())["train"]["tokens_per_s"] == 2


def test_samples_are_a_table(many_samples):
    with machine_metrics("train"):
        time.sleep(0.3)

    header, *rows = (line.split("\t") for line in (many_samples / "metrics/machine/train.tsv").read_text().splitlines())
    assert header[:2] == ["seconds", "process_memory_gib"]
    assert len(rows) >= 3
    seconds = [float(row[0]) for row in rows]
    assert seconds == sorted(seconds)
    peak = json.loads((many_samples / "metrics/machine.json").read_text())["train"]["peak_process_memory_gib"]
    assert peak == max(float(row[1]) for row in rows)


def test_memory_of_children_counts(many_samples, start_python):
    def peak_gib(stage):
        with machine_metrics(stage):
            time.sleep(0.05)
        return json.loads((many_samples / "metrics/machine.json").read_text())[stage]["peak_process_memory_gib"]

    alone = peak_gib("alone")
    child = start_python("import time; held = b'x' * 400 * 2**20; print('holds', flush=True); time.sleep(60)")
    assert child.stdout.readline() == "holds\n"

    assert peak_gib("with_child") == pytest.approx(alone + 0.4, abs=0.05)


def test_stage_that_fails_has_no_machine_metrics(many_samples):
    with pytest.raises(ZeroDivisionError), machine_metrics("train"):
        1 / 0  # noqa: B018

    assert not (many_samples / "metrics").exists()


class NVMLError(Exception):
    pass


def unsupported(handle):
    raise NVMLError("not supported")


@pytest.fixture
def gpu(monkeypatch):
    """One whose NVML answers with 3 GiB, 97%, 652.3 W; a test changes that."""
    gpu = machine.Gpu()
    gpu.handle = "gpu"
    gpu.nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97),
        nvmlDeviceGetPowerUsage=lambda handle: 652_300,
        nvmlDeviceGetTotalEnergyConsumption=unsupported,
    )
    monkeypatch.setattr(machine, "this_gpu", lambda: gpu)
    return gpu


def count_energy(gpu, *millijoules):
    """What the GPU says each time it is asked, of all since its driver was loaded."""
    counter = iter(millijoules)
    gpu.nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counter)


def test_a_gpu_that_does_not_answer_costs_nobody_their_training(many_samples, gpu):
    gpu.nvml.nvmlDeviceGetUtilizationRates = gpu.nvml.nvmlDeviceGetPowerUsage = unsupported

    with machine_metrics("train"):
        pass

    entry = json.loads(machine.MACHINE.read_text())["train"]
    assert entry["peak_gpu_memory_gib"] == 3
    assert "peak_gpu_power_w" not in entry
    assert "joules" not in entry


def test_energy_is_that_of_the_block(many_samples, gpu):
    count_energy(gpu, 10_000, 14_000)

    with machine_metrics("train"):
        pass

    entry = json.loads((many_samples / "metrics/machine.json").read_text())["train"]
    assert entry["joules"] == 4
    assert (entry["peak_gpu_utilization_percent"], entry["peak_gpu_power_w"]) == (97, 652)
    table = (many_samples / "metrics/machine/train.tsv").read_text().splitlines()
    assert table[0] == "seconds\tprocess_memory_gib\tgpu_memory_gib\tgpu_utilization_percent\tgpu_power_w"


@pytest.fixture
def two_seconds(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))


@pytest.mark.usefixtures("two_seconds")
def test_rates_are_those_since_the_meter_was_made(gpu):
    count_energy(gpu, 50_000_000, 50_600_000)

    assert Meter().rates(40_000) == {"tokens_per_s": 20_000, "joules_per_million_tokens": 15_000}


@pytest.mark.usefixtures("two_seconds")
def test_training_that_had_nothing_left_to_do_has_no_energy_a_token(gpu):
    count_energy(gpu, 50_000_000, 50_600_000)

    assert Meter().rates(0) == {"tokens_per_s": 0}


@pytest.mark.usefixtures("two_seconds")
def test_rates_where_energy_is_unknown_are_tokens_alone(gpu):
    assert Meter().rates(40_000) == {"tokens_per_s": 20_000}


def test_energy_that_the_gpu_stops_counting_is_unknown(gpu):
    count_energy(gpu, 10_000)
    meter = Meter()
    gpu.nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported

    assert meter.joules is None


def test_a_gpu_without_nvml_is_said_and_not_measured(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert machine.Gpu().read() == {}
    assert "GPU utilization and power are not measured" in caplog.text
    assert "requirements-gpu.txt" in caplog.text
