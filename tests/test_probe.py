from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from pdf2lora.training.trainer import build_model, build_trainer
from ruamel.yaml import YAML
from tiny_llama import (
    COMPUTE,
    LORA,
    QUANTIZATION,
    TRAIN,
    changed,
    quiet,
    random_sequences,
    same,
    trainable,
    write_tiny_llama,
)

from pdf2lora.errors import InputError
from pdf2lora.params import Train
from pdf2lora.runtime.monitor import device_name
from pdf2lora.tokens import pack
from pdf2lora.training import probe
from pdf2lora.training.batch_search import Measurement
from pdf2lora.training.probe import PeakMemory, StepClock

MIB = 2**20
TWO_ROWS = pack([np.arange(60)], bos=1, eos=2, seq_length=32)


def params_of(**changes):
    train = {key: value for key, value in changes.items() if key in TRAIN.model_dump()}
    compute = {key: value for key, value in changes.items() if key in COMPUTE.model_dump()}
    return SimpleNamespace(
        train=changed(TRAIN, **train),
        compute=changed(COMPUTE, **compute),
        lora=LORA,
        quantization=QUANTIZATION,
        find_batch=SimpleNamespace(steps=3),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# possibilities


def test_possibilities_are_those_of_the_machine_and_of_params():
    params = params_of(kernels="reference", gradient_checkpointing="none")

    assert probe.possibilities(params) == (device_name(), "reference", ("none",))


@pytest.mark.parametrize(
    ("asked", "refused"),
    [({"kernels": "fused"}, "compute.kernels: 'fused'"), ({"gradient_checkpointing": "mlp"}, "checkpointing: 'mlp'")],
)
def test_what_cannot_run_is_refused(on_cpu, asked, refused):
    with pytest.raises(InputError, match=refused):
        probe.possibilities(params_of(**asked))


# prepare, training_step


@quiet
def test_prepared_model_is_the_one_that_train_trains(base, own_logging):
    prepared = probe.prepare(base, params_of(), TWO_ROWS, "reference")

    assert same(trainable(prepared.model), trainable(build_model(base, QUANTIZATION, LORA, COMPUTE, seed=0)))
    assert (probe.free_gib(prepared) > 0) == torch.cuda.is_available()


def test_probe_is_of_full_steps_even_of_a_short_corpus(monkeypatch):
    """And times all but the first, which compiles and warms up."""
    monkeypatch.setattr(PeakMemory, "gib", 0.5)
    limits, built = [], []
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(probe, "limit_gpu_memory", limits.append)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))

    def build(model, sequences, **arguments):
        built.append((model, sequences, arguments))
        (step_clock,) = arguments["callbacks"]
        return SimpleNamespace(train=lambda: [step_clock.on_step_end(None, None, None) for _ in range(3)])

    monkeypatch.setattr(probe, "build_trainer", build)
    prepared = probe.Prepared(params_of(), TWO_ROWS, "reference", "the model", free_gib=0.0)

    measurement = probe.training_step(prepared, "none", 5, 7.5)

    assert measurement == Measurement(0.5, 5 * 32 / 1.5)
    assert limits == [7.5]
    ((model, sequences, arguments),) = built
    assert sequences.input_ids.shape == sequences.labels.shape == (5 * 3, 32)
    assert (model, arguments["train"], arguments["kernels"]) == ("the model", TRAIN, "reference")
    assert (arguments["per_device_batch"], arguments["max_steps"]) == (5, 3)
    assert (arguments["gradient_checkpointing"], arguments["gradient_accumulation_steps"]) == ("none", 1)


# every setting of train that dvc.yaml does not list for find_batch, and another value of it than in TRAIN
ASIDE = {
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
    "report_to": "wandb",
}


@quiet
def test_settings_that_do_not_run_find_batch_again_change_no_probe(on_cpu, base, own_logging):
    stages = YAML(typ="safe", pure=True).load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    listed = {key.removeprefix("train.") for key in stages["find_batch"]["params"] if key.startswith("train")}

    def peak_gib(params):
        prepared = probe.prepare(base, params, TWO_ROWS, "reference")
        with PeakMemory() as peak:  # a measurement's is rounded
            probe.training_step(prepared, "full", 2, budget_gib=1.0)
        return peak.gib

    assert set(ASIDE) == set(Train.model_fields) - listed
    assert peak_gib(params_of(**ASIDE)) == peak_gib(params_of()) != peak_gib(params_of(optim="adamw_torch"))


def test_steps_to_warm_up_are_not_timed(on_cpu):
    clock = StepClock(steps_to_warm_up=2)
    clock.ends = [10.0, 20.0, 21.0, 22.5]

    assert clock.seconds_of_a_step == 1.25


# PeakMemory


def mib(num_mib):
    return torch.empty(num_mib * MIB, dtype=torch.uint8)


def peak_mib(action):
    with PeakMemory() as peak:
        action()
    return peak.gib * 1024


def test_peak_of_nothing_is_zero(on_cpu):
    assert peak_mib(lambda: None) == 0


def test_peak_of_a_known_sequence(on_cpu):
    def action():
        one = mib(1)
        two = mib(2)
        del one
        five = mib(5)  # 7 now
        del two
        three = mib(3)  # 8 now
        del five, three
        mib(6)

    assert peak_mib(action) == 8


def test_views_and_changes_in_place_take_no_memory(on_cpu):
    def action():
        tensor = mib(4)
        tensor.view(2, -1)[1].add_(1)
        tensor.detach().reshape(-1)[: MIB // 2].zero_()

    assert peak_mib(action) == 4


def test_tensor_from_before_the_block_counts_once_it_is_used(on_cpu):
    before = mib(3)

    assert peak_mib(lambda: before.add_(1)) == 3
    assert peak_mib(lambda: before + 1) == 6


def test_what_an_autograd_graph_keeps_counts_until_backward_is_through(on_cpu):
    weight = torch.ones(MIB // 4)  # 1 MiB

    def forward():
        value = weight
        for _ in range(5):
            value = value.sin()  # its backward needs what went in
        return value.sum()

    with torch.no_grad():
        assert peak_mib(forward) == pytest.approx(2 + 1, abs=0.01)  # weight, what goes in, what comes out
    weight.requires_grad_()
    assert peak_mib(forward) == pytest.approx(1 + 5, abs=0.01)

    def two_steps():
        for _ in range(2):
            forward().backward()
            weight.grad = None

    one = peak_mib(lambda: forward().backward())
    weight.grad = None
    assert peak_mib(two_steps) == pytest.approx(one, abs=0.01)


def test_error_in_the_block_comes_out_and_nothing_is_counted_after_it(on_cpu):
    with pytest.raises(ZeroDivisionError), PeakMemory() as peak:  # noqa: PT012
        mib(1)
        1 / 0  # noqa: B018
    mib(9)

    assert peak.gib * 1024 == 1


@quiet
def test_peak_of_a_training_step_is_the_same_again_and_with_other_numbers_of_threads(on_cpu, base, tmp_path):
    def step_gib(num_threads, *, batch=2, checkpointing="full"):
        torch.set_num_threads(num_threads)
        model = build_model(base, QUANTIZATION, LORA, COMPUTE, seed=0)
        with PeakMemory() as peak:
            build_trainer(
                model,
                random_sequences(2 * batch),
                train=TRAIN,
                compute=COMPUTE,
                kernels="reference",
                gradient_checkpointing=checkpointing,
                per_device_batch=batch,
                gradient_accumulation_steps=1,
                checkpoints=tmp_path,
                max_steps=2,
            ).train()
            return peak.gib

    num_threads = torch.get_num_threads()
    try:
        first = step_gib(1)
        assert step_gib(1) == first
        assert step_gib(2) == first
        assert step_gib(1, batch=4) > first
        assert step_gib(1, checkpointing="none") > first
    finally:
        torch.set_num_threads(num_threads)
