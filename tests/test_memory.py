import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import LORA, QUANTIZATION, TRAIN, changed, quiet, random_sequences, write_tiny_llama

from pdf2lora.errors import InputError
from pdf2lora.memory import PeakMemory, Probe, choose, measure_in_child, memory_model, search
from pdf2lora.training import build_trainer

MIB = 2**20


# search


def searched(peaks, *, budget_gib):
    """The largest batch that fits and all probes; peaks[batch - 1] is a batch's peak."""
    probes = search(lambda batch: peaks[batch - 1], smallest=1, largest=len(peaks), budget_gib=budget_gib)
    assert [probe.peak_gib for probe in probes] == [peaks[probe.batch - 1] for probe in probes]
    assert len({probe.batch for probe in probes}) == len(probes)
    return max((probe.batch for probe in probes if probe.fits), default=None), probes


def largest_of_all(peaks, *, budget_gib):
    fitting = [number for number, peak in enumerate(peaks, 1) if peak is not None and peak <= budget_gib]
    return max(fitting, default=None)


@settings(deadline=None)
@given(fixed=st.floats(0, 50), slope=st.floats(0.01, 5), budget=st.floats(0.1, 100))
def test_line_needs_few_probes(fixed, slope, budget):
    peaks = [round(fixed + slope * batch, 3) for batch in range(1, 513)]

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 6


GROWTHS = {
    "convex": lambda batch: 0.1 * batch + 0.0002 * batch**2,
    "square": lambda batch: 0.002 * batch**2,
    "concave": lambda batch: batch**0.8,
    "stairs": lambda batch: 5.0 * math.ceil(batch / 40),
    "jump": lambda batch: 0.01 * batch + (80 if batch > 411 else 0),
    "flat": lambda batch: 10.0,
}


@settings(deadline=None)
@given(name=st.sampled_from(sorted(GROWTHS)), fixed=st.floats(0, 20), budget=st.floats(0.1, 120))
def test_other_growths_are_searched_in_a_bounded_number_of_probes(name, fixed, budget):
    peaks = [fixed + GROWTHS[name](batch) for batch in range(1, 513)]

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.floats(0.1, 60))
def test_noisy_growth(seed, budget):
    peaks = np.random.default_rng(seed).choice([0, 0.05, 0.1, 0.3], size=512).cumsum().tolist()

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


@settings(deadline=None)
@given(last=st.integers(0, 512), budget=st.floats(1, 100))
def test_memory_that_ends_before_the_budget_does(last, budget):
    peaks = [0.1 * batch if batch <= last else None for batch in range(1, 513)]

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


def test_answer_is_proved_by_a_probe_of_the_next_batch():
    largest, probes = searched([batch * 1.0 for batch in range(1, 101)], budget_gib=37.5)

    assert largest == 37
    assert [probe.batch for probe in probes] == [1, 2, 37, 38]
    assert [probe.fits for probe in probes] == [True, True, True, False]


def test_all_fit():
    largest, probes = searched([0.1 * batch for batch in range(1, 513)], budget_gib=1000)

    assert largest == 512
    assert len(probes) == 3


@pytest.mark.parametrize("peak", [8.0, None])
def test_nothing_fits(peak):
    assert searched([peak] * 64, budget_gib=7) == (None, [Probe(1, False, peak)])


def test_search_stays_within_its_bounds():
    probes = search(lambda batch: batch * 1.0, smallest=4, largest=9, budget_gib=100)

    assert [probe.batch for probe in probes] == [4, 8, 9]
    assert search(lambda batch: 1.0, smallest=5, largest=5, budget_gib=2) == [Probe(5, True, 1.0)]


def test_memory_model_is_the_line_through_the_two_largest_that_ended():
    probes = [Probe(1, True, 9.0), Probe(4, True, 6.0), Probe(8, False, 8.0), Probe(16, False, None)]

    assert memory_model(probes) == (4.0, 0.5)
    assert memory_model([Probe(1, True, 9.0), Probe(16, False, None)]) is None


# choose


def probes_with_largest(largest):
    return [Probe(1, True, 0.1), Probe(largest, True, 1.0), Probe(largest + 1, False, None)]


@pytest.mark.parametrize(
    ("largest", "effective_batch", "chosen"),
    [
        (9, 4, (4, 1)),
        (3, 4, (2, 2)),
        (9, 32, (8, 4)),
        (19, 64, (16, 4)),
        (64, 64, (64, 1)),
        (7, 12, (6, 2)),
        (12, 13, (1, 13)),  # prime
        (13, 13, (13, 1)),
        (1, 6, (1, 6)),
        (19, "auto", (19, 1)),
    ],
)
def test_choice_is_the_largest_divisor_that_fits(largest, effective_batch, chosen):
    assert choose(probes_with_largest(largest), effective_batch) == chosen


@pytest.mark.parametrize(("peak", "what_happens"), [(8.125, "needs 8.12 GiB"), (None, "runs out of memory")])
@pytest.mark.parametrize("effective_batch", [4, "auto"])
def test_choice_where_nothing_fits(peak, what_happens, effective_batch):
    with pytest.raises(InputError) as caught:
        choose([Probe(2, False, peak)], effective_batch)

    assert str(caught.value) == (
        f"find_batch.min: 2 sequences do not fit: a training step {what_happens}; lower find_batch.min or "
        "train.seq_length, turn train.gradient_checkpointing on, or raise find_batch.cpu_memory_gib "
        "(on a GPU: lower find_batch.gpu_headroom_gib)"
    )


# measure_in_child; what the child does is at the level of the module, where it can be pickled


def product(left, right):
    return left * right


def process_id():
    return os.getpid()


def run_out_of(kind):
    if kind == "CPU":
        torch.empty(2**55)
    raise {"GPU": torch.OutOfMemoryError, "numpy": MemoryError}[kind]("no memory is left")


def die_of(signal_number):
    os.kill(os.getpid(), signal_number)


def leave():
    os._exit(3)


def refuse():
    raise InputError("train.attention: 'flash_attention_2' cannot run here")


def stumble():
    raise KeyError("lm_head")


def test_result_of_a_child():
    assert measure_in_child(product, 6, 0.5) == 3.0


def test_child_is_a_process_of_its_own_each_time():
    assert len({measure_in_child(process_id), measure_in_child(process_id), float(os.getpid())}) == 3


@pytest.mark.parametrize("kind", ["CPU", "GPU", "numpy"])
def test_child_that_runs_out_of_memory(kind):
    assert measure_in_child(run_out_of, kind) is None


def test_child_that_is_killed_ran_out_of_memory():
    assert measure_in_child(die_of, signal.SIGKILL) is None


def test_child_that_crashes_did_not_run_out_of_memory():
    with pytest.raises(RuntimeError, match="the training step of a probe ended with exit code -11"):
        measure_in_child(die_of, signal.SIGSEGV)
    with pytest.raises(RuntimeError, match="the training step of a probe ended with exit code 3"):
        measure_in_child(leave)


def test_input_error_of_a_child_passes_through():
    with pytest.raises(InputError) as caught:
        measure_in_child(refuse)

    assert str(caught.value) == "train.attention: 'flash_attention_2' cannot run here"


def test_other_errors_of_a_child_keep_their_text():
    with pytest.raises(RuntimeError) as caught:
        measure_in_child(stumble)

    assert str(caught.value) == "the training step of a probe failed: KeyError: 'lm_head'"


# PeakMemory


def mib(num_mib):
    return torch.empty(num_mib * MIB, dtype=torch.uint8)


def peak_mib(action):
    with PeakMemory() as peak:
        action()
    return peak.gib * 1024


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@quiet
def test_peak_of_a_training_step_is_the_same_again_and_with_other_numbers_of_threads(on_cpu, base, tmp_path):
    def step_gib(num_threads, *, batch=2, **changes):
        torch.set_num_threads(num_threads)
        with PeakMemory() as peak:
            build_trainer(
                base,
                random_sequences(2 * batch),
                quantization=QUANTIZATION,
                lora=LORA,
                train=changed(TRAIN, **changes),
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
        assert step_gib(1, gradient_checkpointing=False) > first
    finally:
        torch.set_num_threads(num_threads)
