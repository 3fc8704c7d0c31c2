"""Probes of the training step on a CPU, and the peak memory that they measure."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_forked
from helpers import REPOSITORY
from ruamel.yaml import YAML
from tiny_llama import COMPUTE, LORA, QUANTIZATION, TRAIN, changed, quiet, same, trainable, write_tiny_llama

from pdf2lora.errors import InputError
from pdf2lora.params import Train
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import Sequences
from pdf2lora.training import probe
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.job import build_model
from pdf2lora.training.loop import Learner
from pdf2lora.training.probe import PeakMemory, Prober
from pdf2lora.training.probe_processes import OutOfMemory

MIB = 2**20
TWO_ROWS = Sequences(np.arange(62, dtype=np.int32), 32)
pytestmark = [quiet, pytest.mark.usefixtures("own_logging")]


def params_of(*, num_steps: int = 2, **changes: Any) -> Any:
    train = {key: value for key, value in changes.items() if key in TRAIN.model_dump()}
    compute = {key: value for key, value in changes.items() if key in COMPUTE.model_dump()}
    return SimpleNamespace(
        train=changed(TRAIN, **train),
        compute=changed(COMPUTE, **compute),
        lora=LORA,
        quantization=QUANTIZATION,
        find_batch=SimpleNamespace(steps=num_steps),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("project") / "models/base")


@pytest.fixture(autouse=True)
def project(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parents[1])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# Capabilities


def test_capabilities_are_those_of_the_machine_and_of_params() -> None:
    params = params_of(kernels="reference", gradient_checkpointing="none")

    capabilities = Prober(params).capabilities()

    assert (capabilities.device, capabilities.kernels) == (device_name(), "reference")
    assert capabilities.gradient_checkpointing == ("none",)
    assert (capabilities.free_gib > 0) == torch.cuda.is_available()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("changes", "words"),
    [({"kernels": "fused"}, "compute.kernels"), ({"gradient_checkpointing": "mlp"}, "gradient_checkpointing")],
)
def test_settings_that_cannot_run_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Prober(params_of(**changes)).capabilities()


# Probes


def test_a_probe_takes_full_steps_of_the_model_of_train(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds for a short corpus. All steps but the first are timed."""
    monkeypatch.setattr(PeakMemory, "gib", 0.5)
    clock = iter([9.0, 10.0, 13.0])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    limits: list[float] = []
    monkeypatch.setattr(probe, "limit_gpu_memory", limits.append)
    steps: list[tuple[int, list[int]]] = []
    at_start: list[Any] = []

    def step(learner: Learner, sequences: Any, indices: Any, number: int) -> None:
        at_start.append(trainable(learner.model))
        steps.append((number, indices.tolist()))
        assert learner.plan.gradient_checkpointing == "none"
        assert (learner.plan.per_device_batch, learner.plan.effective_batch) == (5, 5)

    monkeypatch.setattr(Learner, "step", step)

    measurement = Prober(params_of(num_steps=3)).measure(base, TWO_ROWS, "none", 5, 7.5, "gpu")

    assert measurement == Measurement(0.5, 5 * 32 / 1.5)
    assert limits == [7.5]
    assert steps == [(0, [0, 1, 0, 1, 0]), (1, [1, 0, 1, 0, 1]), (2, [0, 1, 0, 1, 0])]
    assert same(at_start[0], trainable(build_model(base, params_of())))


@pytest.mark.usefixtures("on_cpu")
def test_a_probe_above_the_budget_ends_after_its_first_step(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakMemory, "gib", 0.5)
    clock = iter([9.0, 11.0])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    steps: list[int] = []
    monkeypatch.setattr(Learner, "step", lambda learner, sequences, indices, number: steps.append(number))

    measurement = Prober(params_of(num_steps=3)).measure(base, TWO_ROWS, "full", 5, 0.4, "gpu")

    assert measurement == Measurement(0.5, 5 * 32 / 2.0)
    assert steps == [0]


# Every setting of train that dvc.yaml does not list for find_batch, with another value than in TRAIN.
OTHER_SETTINGS = {
    "num_train_epochs": 3,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 2.0,
    "weight_decay": 0.1,
    "max_grad_norm": 0.01,
    "logging_steps": 7,
    "eval_steps": 7,
    "save_steps": 7,
    "seed": 5,
    "keep": "best",
    "replay": "books",
    "replay_share": 0.5,
    "early_stopping_patience": 3,
    "report_to": "wandb",
}


@pytest.mark.usefixtures("on_cpu")
def test_settings_that_do_not_run_find_batch_again_change_no_probe(base: Path) -> None:
    stages = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    listed = {key.removeprefix("train.") for key in stages["find_batch"]["params"] if key.startswith("train")}

    def peak_gib(params: Any) -> float:
        prober = Prober(params)
        prober.model, prober.placement = build_model(base, params), "gpu"
        with PeakMemory() as peak:  # a measurement's peak is rounded
            prober.measure(base, TWO_ROWS, "full", 2, 1.0, "gpu")
        return peak.gib

    assert set(OTHER_SETTINGS) == set(Train.model_fields) - listed
    expected = peak_gib(params_of())
    assert peak_gib(params_of(**OTHER_SETTINGS)) == expected
    assert peak_gib(params_of(optim="adamw_torch")) != expected


@pytest.mark.usefixtures("on_cpu")
def test_the_peak_of_a_probe_is_the_same_again_and_for_any_number_of_threads(base: Path) -> None:
    """This also holds for later probes of the same model."""
    prober = Prober(params_of())
    prober.model, prober.placement = build_model(base, params_of()), "gpu"

    def peak_gib(gradient_checkpointing: str, *, num_threads: int = 1, batch: int = 2) -> float:
        torch.set_num_threads(num_threads)
        with PeakMemory() as peak:  # a measurement's peak is rounded
            prober.measure(base, TWO_ROWS, gradient_checkpointing, batch, 1.0, "gpu")
        return peak.gib

    threads_before = torch.get_num_threads()
    try:
        full, none = peak_gib("full"), peak_gib("none")
        assert peak_gib("full", num_threads=2) == full
        assert peak_gib("none") == none > full
        assert peak_gib("full", batch=4) > full
    finally:
        torch.set_num_threads(threads_before)


def test_processes_measure_together(base: Path) -> None:
    """The throughput counts the sequences of all processes. Each process gets the same answer."""

    def work(processes: Processes) -> Any:
        return Prober(params_of()).measure(base, TWO_ROWS, "full", 3, 1.0, "gpu")

    first, second = run_forked(2, work)

    assert isinstance(first, Measurement)
    assert first.peak_gib == second.peak_gib
    assert first.tokens_per_s > 0


def fail_in_the_model(number: int) -> None:
    def build(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    probe.build_model = build


def fail_in_the_learner(number: int) -> None:
    class NoLearner:
        def __init__(self, *arguments: Any, **settings: Any):
            raise torch.OutOfMemoryError("CUDA out of memory")

    probe.Learner = NoLearner  # type: ignore[misc, assignment]


def fail_in_a_step(number: int) -> None:
    step = Learner.step

    def fail(learner: Learner, sequences: Any, indices: Any, step_number: int) -> Any:
        if step_number == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(learner, sequences, indices, step_number)

    Learner.step = fail  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("fail", "number"),
    [(fail_in_the_model, 0), (fail_in_the_learner, 0), (fail_in_a_step, 0), (fail_in_a_step, 1)],
)
def test_all_processes_notice_that_one_is_out_of_memory(
    base: Path, failing: int, fail: Callable[[int], None], number: int
) -> None:
    """The other processes do not wait for it in a collective."""

    def work(processes: Processes) -> Any:
        if processes.index == failing:
            fail(number)
        return Prober(params_of()).measure(base, TWO_ROWS, "full", 2, 1.0, "gpu")

    assert run_forked(2, work) == [OutOfMemory(is_clean=False)] * 2


# PeakMemory


def mib(num_mib: int) -> torch.Tensor:
    return torch.empty(num_mib * MIB, dtype=torch.uint8)


def peak_mib(action: Callable[[], object]) -> float:
    with PeakMemory() as peak:
        action()
    return peak.gib * 1024


def test_the_peak_of_an_empty_block_is_zero(on_cpu: None) -> None:
    assert peak_mib(lambda: None) == 0


def test_peak_of_a_known_sequence(on_cpu: None) -> None:
    def action() -> None:
        one = mib(1)
        two = mib(2)
        del one
        five = mib(5)  # 7 now
        del two
        three = mib(3)  # 8 now
        del five, three
        mib(6)

    assert peak_mib(action) == 8


def test_views_and_changes_in_place_take_no_memory(on_cpu: None) -> None:
    def action() -> None:
        tensor = mib(4)
        tensor.view(2, -1)[1].add_(1)
        tensor.detach().reshape(-1)[: MIB // 2].zero_()

    assert peak_mib(action) == 4


def test_tensor_from_before_the_block_counts_once_it_is_used(on_cpu: None) -> None:
    before = mib(3)

    assert peak_mib(lambda: before.add_(1)) == 3
    assert peak_mib(lambda: before + 1) == 6


def test_tensors_of_an_autograd_graph_count_until_the_backward_pass_ends(on_cpu: None) -> None:
    weight = torch.ones(MIB // 4)  # 1 MiB

    def forward() -> torch.Tensor:
        value = weight
        for _ in range(5):
            value = value.sin()  # its backward needs what went in
        return value.sum()

    with torch.no_grad():
        assert peak_mib(forward) == pytest.approx(2 + 1, abs=0.01)  # weight, what goes in, what comes out
    weight.requires_grad_()
    assert peak_mib(forward) == pytest.approx(1 + 5, abs=0.01)

    def two_steps() -> None:
        for _ in range(2):
            forward().backward()
            weight.grad = None

    one = peak_mib(lambda: forward().backward())
    weight.grad = None
    assert peak_mib(two_steps) == pytest.approx(one, abs=0.01)


def test_an_error_in_the_block_is_raised_and_ends_the_count(on_cpu: None) -> None:
    with pytest.raises(ZeroDivisionError), PeakMemory() as peak:  # noqa: PT012
        mib(1)
        1 / 0  # noqa: B018
    mib(9)

    assert peak.gib * 1024 == 1
