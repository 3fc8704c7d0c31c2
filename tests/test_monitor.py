import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pdf2lora.runtime import monitor
from pdf2lora.runtime.monitor import machine_metrics


@pytest.fixture
def fast_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitor, "SAMPLE_S", 0.02)
    return tmp_path


def test_two_stages_have_two_entries(fast_sampling):
    with machine_metrics("find_batch"):
        time.sleep(0.1)
    with machine_metrics("train") as entry:
        entry["tokens_per_s"] = 123

    metrics = json.loads((fast_sampling / "metrics/machine.json").read_text())
    assert metrics.keys() == {"machine", "find_batch", "train"}
    assert {"processor", "gpu", "python", "torch", "transformers", "peft", "bitsandbytes"} < metrics["machine"].keys()
    assert metrics["find_batch"]["seconds"] >= 0.1
    assert metrics["train"]["tokens_per_s"] == 123
    assert metrics["train"]["peak_process_memory_gib"] > 0.05


def test_second_run_of_a_stage_replaces_its_entry(fast_sampling):
    for tokens_per_s in (1, 2):
        with machine_metrics("train") as entry:
            entry["tokens_per_s"] = tokens_per_s

    assert json.loads((fast_sampling / "metrics/machine.json").read_text())["train"]["tokens_per_s"] == 2


def test_samples_are_written_as_a_table(fast_sampling):
    with machine_metrics("train"):
        time.sleep(0.3)

    header, *rows = (
        line.split("\t") for line in (fast_sampling / "metrics/machine/train.tsv").read_text().splitlines()
    )
    assert header[:2] == ["seconds", "process_memory_gib"]
    assert len(rows) >= 3
    seconds = [float(row[0]) for row in rows]
    assert seconds == sorted(seconds)
    peak = json.loads((fast_sampling / "metrics/machine.json").read_text())["train"]["peak_process_memory_gib"]
    assert peak == max(float(row[1]) for row in rows)


def test_memory_includes_child_processes(fast_sampling, start_python):
    def peak_gib(stage):
        with machine_metrics(stage):
            time.sleep(0.05)
        return json.loads((fast_sampling / "metrics/machine.json").read_text())[stage]["peak_process_memory_gib"]

    alone = peak_gib("alone")
    child = start_python("import time; block = b'x' * 400 * 2**20; print('allocated', flush=True); time.sleep(60)")
    assert child.stdout.readline() == "allocated\n"

    assert peak_gib("with_child") == pytest.approx(alone + 0.4, abs=0.05)


def test_failed_stage_has_no_entry(fast_sampling):
    with pytest.raises(ZeroDivisionError), machine_metrics("train"):
        1 / 0  # noqa: B018

    assert not (fast_sampling / "metrics").exists()


class NVMLError(Exception):
    pass


def unsupported(handle):
    raise NVMLError("not supported")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose sensors read 3 GiB, 97% and 652.3 W."""
    gpu = monitor.Gpu()
    gpu.handle = "gpu"
    gpu.nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97),
        nvmlDeviceGetPowerUsage=lambda handle: 652_300,
    )
    monkeypatch.setattr(monitor, "Gpu", lambda: gpu)
    return gpu


def test_sensor_that_does_not_answer_is_left_out(fast_sampling, gpu):
    gpu.nvml.nvmlDeviceGetUtilizationRates = gpu.nvml.nvmlDeviceGetPowerUsage = unsupported

    with machine_metrics("train"):
        pass

    entry = json.loads(monitor.MACHINE.read_text())["train"]
    assert entry["peak_gpu_memory_gib"] == 3
    assert "peak_gpu_power_w" not in entry


def test_gpu_sensors_are_columns_and_peaks(fast_sampling, gpu):
    with machine_metrics("train"):
        pass

    entry = json.loads(monitor.MACHINE.read_text())["train"]
    assert (entry["peak_gpu_utilization_percent"], entry["peak_gpu_power_w"]) == (97, 652)
    table = (fast_sampling / "metrics/machine/train.tsv").read_text().splitlines()
    assert table[0] == "seconds\tprocess_memory_gib\tgpu_memory_gib\tgpu_utilization_percent\tgpu_power_w"


def test_missing_nvml_is_logged(monkeypatch, log):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert monitor.Gpu().read() == {}
    assert "GPU utilization and power are not measured" in log[0]
    assert "requirements-gpu.txt" in log[0]
