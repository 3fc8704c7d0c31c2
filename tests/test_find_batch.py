"""The stage find_batch. One test has real probes of a tiny model, the others have probes that compute nothing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers import prose
from tiny_llama import TINY_SETTINGS, TRAIN, by_key, changed, quiet, write_split

from pdf2lora.errors import InputError
from pdf2lora.params import FindBatch
from pdf2lora.training.batch_search import Measurement, per_device_batch
from pdf2lora.training.probe_processes import Capabilities
from stages import find_batch

pytestmark = quiet
LIMITS = FindBatch(min=1, max=16, steps=2, memory_gib="auto", cpu_memory_gib=0.008, gpu_headroom_gib=1.0)
SETTINGS: dict[str, Any] = {
    **TINY_SETTINGS,
    **by_key(find_batch=LIMITS),
    "evaluate.stride": 12,
}


@pytest.fixture
def project(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, write_params: Any) -> Any:
    """A project before find_batch; `configure` writes its params.yaml with changes."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    write_split(tmp_path, "train", [prose(seed, 20) for seed in range(3)], base)
    shutil.copytree(base, tmp_path / "models/base")

    def configure(changes: dict[str, Any] | None = None) -> None:
        write_params(SETTINGS | (changes or {}))

    configure()
    return SimpleNamespace(configure=configure)


def read(file: str) -> dict[str, Any]:
    return dict(json.loads(Path(file).read_text()))


def error_of_stage() -> str:
    with pytest.raises(SystemExit) as caught:
        find_batch.main()
    return str(caught.value.code)


class FakeProbes:
    """Probes that need `gib` GiB per sequence and give `tokens_per_s`, by the value of gradient_checkpointing."""

    device: ClassVar[str] = "NVIDIA T4"
    settings: ClassVar[tuple[str, ...]] = ("full",)
    gib: ClassVar[dict[str, float]] = {"none": 0.004, "full": 0.001}
    tokens_per_s: ClassVar[dict[str, float]] = {"none": 300.0, "full": 200.0}
    last: ClassVar["FakeProbes"]

    def __init__(self, params: Any, count: int):
        self.params, self.count = params, count
        self.measured: list[tuple[str, int]] = []
        self.has_ended = False
        type(self).last = self

    def __enter__(self) -> "FakeProbes":
        return self

    def __exit__(self, *error: object) -> None:
        self.has_ended = True

    def capabilities(self) -> Capabilities:
        return Capabilities(self.device, "reference", self.settings, 0.0, ("gpu",), 0.0, "the reason")

    def measure(self, gradient_checkpointing: str, batch: int, budget_gib: float, placement: str) -> Measurement:
        assert placement == "gpu"
        assert not self.has_ended
        assert budget_gib == 0.012
        self.measured.append((gradient_checkpointing, batch))
        return Measurement(self.gib[gradient_checkpointing] * batch, self.tokens_per_s[gradient_checkpointing])


@pytest.fixture
def fake_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 sequences fit with full, and 3 with none."""
    monkeypatch.setattr(find_batch, "ProbeProcesses", FakeProbes)
    monkeypatch.setattr(find_batch, "memory_budget_gib", lambda settings, capabilities: 0.012)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the budget is that of a CPU")
@pytest.mark.timeout(300)  # another process imports torch
def test_real_probes(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    project.configure({"train.effective_batch": 6, "train.gradient_checkpointing": "auto", "compute.seq_length": 128})

    find_batch.main()

    found = read("metrics/batch.json")
    fits = {probe["batch"]: probe["fits"] for probe in found["probes"]}
    largest = max(batch for batch in fits if fits[batch])
    assert 1 < largest < 16
    assert fits[largest + 1] is False
    assert (found["device"], found["kernels"], found["num_processes"]) == ("cpu", "reference", 1)
    assert (found["memory_gib"], found["budget_gib"]) == ("auto", 0.008)
    assert found["largest_batch"] == found["modes"]["none"]["largest_batch"] == largest
    assert found["modes"]["none"]["gib_per_sequence"] > 0
    assert list(found["modes"]) == [found["gradient_checkpointing"]] == ["none"]
    assert found["per_device_batch"] == per_device_batch(largest, 6, 1)
    assert found["per_device_batch"] * found["gradient_accumulation_steps"] >= 6
    assert found["effective_batch"] == 6
    assert f"find_batch: {largest} sequences fit in" in capsys.readouterr().out
    machine = read("metrics/machine.json")["find_batch"]
    assert [timing["batch"] for timing in machine["timings"]] == list(fits)
    assert all(timing["tokens_per_s"] > 0 for timing in machine["timings"])


@pytest.mark.usefixtures("fake_probes")
@pytest.mark.parametrize(
    ("effective_batch", "num_processes", "per_device_batch", "accumulation", "in_all"),
    [
        ("auto", 1, 12, 1, 12),
        ("auto", 2, 12, 1, 24),
        (12, 1, 12, 1, 12),
        (24, 1, 12, 2, 24),
        (13, 1, 7, 2, 13),
        (24, 2, 12, 1, 24),
        (50, 2, 9, 3, 50),
        (2, 4, 1, 1, 2),
    ],
)
def test_the_effective_batch_of_params_is_kept(
    project: Any, effective_batch: Any, num_processes: int, per_device_batch: int, accumulation: int, in_all: int
) -> None:
    project.configure({"train.effective_batch": effective_batch, "compute.num_processes": num_processes})

    find_batch.main()

    found = read("metrics/batch.json")
    assert FakeProbes.last.count == found["num_processes"] == num_processes
    assert found["largest_batch"] == 12
    assert (found["per_device_batch"], found["gradient_accumulation_steps"]) == (per_device_batch, accumulation)
    assert found["effective_batch"] == in_all
    assert found["modes"] == {"full": {"largest_batch": 12, "fixed_gib": 0, "gib_per_sequence": 0.001}}
    assert [probe["batch"] for probe in found["probes"]] == [1, 2, 12, 13]


@pytest.mark.usefixtures("fake_probes")
@pytest.mark.parametrize(
    ("effective_batch", "speed_of_none", "chosen"),
    [
        (12, 300.0, ("none", 3, 4)),
        (12, 100.0, ("full", 12, 1)),
        (4, 201.0, ("full", 4, 1)),  # as fast as none with less memory
        ("auto", 100.0, ("full", 12, 1)),
    ],
)
def test_the_fastest_setting_is_chosen(
    project: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    effective_batch: Any,
    speed_of_none: float,
    chosen: tuple[str, int, int],
) -> None:
    monkeypatch.setattr(FakeProbes, "settings", ("none", "full"))
    monkeypatch.setitem(FakeProbes.tokens_per_s, "none", speed_of_none)
    project.configure({"train.effective_batch": effective_batch})

    find_batch.main()

    found = read("metrics/batch.json")
    keys = ("gradient_checkpointing", "per_device_batch", "gradient_accumulation_steps")
    assert tuple(found[key] for key in keys) == chosen
    assert {setting: numbers["largest_batch"] for setting, numbers in found["modes"].items()} == {"none": 3, "full": 12}
    assert found["largest_batch"] == 12
    assert FakeProbes.last.has_ended
    timings = [
        (timing["gradient_checkpointing"], timing["batch"], timing["tokens_per_s"])
        for timing in read("metrics/machine.json")["find_batch"]["timings"]
    ]
    measured = FakeProbes.last.measured
    assert timings == [(setting, batch, {"none": speed_of_none, "full": 200}[setting]) for setting, batch in measured]
    assert len(set(measured)) == len(measured)  # no probe runs twice
    printed = capsys.readouterr().out
    for words in (
        f"{chosen[1]} x {chosen[2]}",
        f"gradient checkpointing {chosen[0]}",
        "reference kernels (the reason)",
    ):
        assert words in printed


@pytest.mark.usefixtures("fake_probes")
@pytest.mark.parametrize(
    ("effective_batch", "num_processes", "settings"),
    [
        (3, 1, ["none"]),
        (6, 2, ["none"]),
        (4, 1, ["none", "full"]),
        (7, 2, ["none", "full"]),
        ("auto", 1, ["none", "full"]),
    ],
)
def test_a_step_that_fits_without_recomputation_needs_no_other_probes(
    project: Any, monkeypatch: pytest.MonkeyPatch, effective_batch: Any, num_processes: int, settings: list[str]
) -> None:
    """3 sequences fit with none."""
    monkeypatch.setattr(FakeProbes, "settings", ("none", "full"))
    project.configure({"train.effective_batch": effective_batch, "compute.num_processes": num_processes})

    find_batch.main()

    assert list(read("metrics/batch.json")["modes"]) == settings


@pytest.mark.usefixtures("fake_probes")
@pytest.mark.parametrize(
    ("gib_of_none", "chosen", "measured"),
    [(0.004, ("none", 3, 4), ["none"] * 4), (0.013, ("full", 12, 1), ["none"] + ["full"] * 4)],
)
def test_on_a_cpu_the_first_setting_that_fits_is_chosen(
    project: Any, monkeypatch: pytest.MonkeyPatch, gib_of_none: float, chosen: tuple[str, int, int], measured: list[str]
) -> None:
    """Not the fastest one: its times could choose differently on another CPU."""
    monkeypatch.setattr(FakeProbes, "device", "cpu")
    monkeypatch.setattr(FakeProbes, "settings", ("none", "full"))
    monkeypatch.setitem(FakeProbes.gib, "none", gib_of_none)
    monkeypatch.setitem(FakeProbes.tokens_per_s, "none", 1.0)
    project.configure({"train.effective_batch": 12})

    find_batch.main()

    found = read("metrics/batch.json")
    keys = ("gradient_checkpointing", "per_device_batch", "gradient_accumulation_steps")
    assert tuple(found[key] for key in keys) == chosen
    assert [setting for setting, _ in FakeProbes.last.measured] == measured


def capabilities_of(device: str, free_gib: float = 0.0) -> Capabilities:
    return Capabilities(device, "fused", ("none",), free_gib, ("gpu",), 0.0)


@pytest.mark.parametrize(
    ("memory_gib", "headroom_gib", "budget_gib"), [("auto", 1.0, 69.0), (20, 1.0, 19.0), (80, 2.5, 67.5), (4.5, 0, 4.5)]
)
def test_the_budget_of_a_gpu_is_the_free_and_allowed_memory_less_the_headroom(
    memory_gib: Any, headroom_gib: float, budget_gib: float
) -> None:
    settings = changed(LIMITS, memory_gib=memory_gib, gpu_headroom_gib=headroom_gib)

    assert find_batch.memory_budget_gib(settings, capabilities_of("NVIDIA T4", 70.0)) == budget_gib


def test_the_budget_without_a_gpu_is_that_of_the_tensors() -> None:
    assert find_batch.memory_budget_gib(changed(LIMITS, memory_gib=20), capabilities_of("cpu")) == 0.008


@pytest.mark.parametrize(("memory_gib", "allowed"), [(1, "1.0"), ("auto", "70.0")])
def test_a_headroom_that_leaves_nothing_is_refused(memory_gib: Any, allowed: str) -> None:
    settings = changed(LIMITS, memory_gib=memory_gib, gpu_headroom_gib=float(allowed))

    with pytest.raises(InputError) as caught:
        find_batch.memory_budget_gib(settings, capabilities_of("NVIDIA T4", 70.0))

    for words in ("find_batch.memory_gib", f"{allowed} GiB", f"find_batch.gpu_headroom_gib ({allowed})", "nvidia-smi"):
        assert words in str(caught.value)


@pytest.mark.usefixtures("fake_probes")
def test_a_smallest_batch_that_does_not_fit_is_reported_in_one_line(project: Any) -> None:
    project.configure({"find_batch.min": 15})

    message = error_of_stage()

    for words in ("error: find_batch.min", "15 sequences do not fit", "needs 0.01", "compute.seq_length"):
        assert words in message
    assert not Path("metrics/batch.json").exists()


@pytest.mark.usefixtures("fake_probes")
def test_a_sequence_longer_than_the_context_is_refused(project: Any) -> None:
    project.configure({"compute.seq_length": 129})

    message = error_of_stage()

    for words in ("error: compute.seq_length", "129", "128"):
        assert words in message


def test_the_import_of_the_stage_is_light(start_python: Any) -> None:
    """Large libraries take seconds to import, and only the probes need them."""
    heavy = "sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & sys.modules.keys())"

    parent = start_python(f"import sys; from stages import find_batch, train; print({heavy})")

    output, errors = parent.communicate()
    assert parent.returncode == 0, errors
    assert output == "[]\n"


def placement_of(
    peaks: dict[str, dict[str, float]], speeds: dict[str, float], *, resident_gib: float = 2.0, budget_gib: float = 10.0
) -> tuple[str, str, int]:
    """peaks: placement -> gradient_checkpointing -> GiB per sequence; speeds: placement -> tokens/s."""
    params: Any = SimpleNamespace(find_batch=changed(LIMITS, max=8), train=changed(TRAIN, effective_batch=8))
    capabilities = Capabilities("NVIDIA T4", "fused", ("none", "full"), 16.0, ("gpu", "host"), resident_gib)

    def measure(placement: str, setting: str, batch: int) -> Measurement:
        return Measurement(peaks[placement][setting] * batch, speeds[placement])

    outcome = find_batch.fastest_placement(params, capabilities, 1, budget_gib, measure)
    return outcome.placement, outcome.choice.gradient_checkpointing, outcome.choice.per_device_batch


def test_streamed_layers_are_tried_only_if_resident_ones_recompute_or_do_not_fit() -> None:
    small = {"none": 0.5, "full": 0.1}
    medium = {"none": 11.0, "full": 1.0}
    large = {"none": 11.0, "full": 11.0}
    fast_host = {"gpu": 100.0, "host": 200.0}

    assert placement_of({"gpu": small, "host": small}, fast_host) == ("gpu", "none", 8)
    assert placement_of({"gpu": medium, "host": small}, fast_host) == ("host", "none", 8)
    assert placement_of({"gpu": medium, "host": small}, {"gpu": 100.0, "host": 99.0}) == ("gpu", "full", 8)
    assert placement_of({"gpu": large, "host": medium}, fast_host) == ("host", "full", 8)
    assert placement_of({"gpu": medium, "host": large}, fast_host) == ("gpu", "full", 8)
    assert placement_of({"host": medium}, fast_host, resident_gib=11.0) == ("host", "full", 8)
    with pytest.raises(InputError, match="do not fit"):
        placement_of({"gpu": large, "host": large}, fast_host)
