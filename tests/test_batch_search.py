"""The memory model, the search for the largest batch, and the choice."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdf2lora.errors import InputError
from pdf2lora.training.batch_search import (
    AS_FAST,
    Measurement,
    Mode,
    Probe,
    choose,
    memory_model,
    per_device_batch,
    search,
    search_modes,
)

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
def test_linear_memory_needs_few_probes(fixed, slope, budget):
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
def test_nonlinear_memory_needs_a_bounded_number_of_probes(name, fixed, budget):
    peaks = [fixed + GROWTHS[name](batch) for batch in range(1, 513)]

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.floats(0.1, 60))
def test_noisy_memory(seed, budget):
    peaks = np.random.default_rng(seed).choice([0, 0.05, 0.1, 0.3], size=512).cumsum().tolist()

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


@settings(deadline=None)
@given(last=st.integers(0, 512), budget=st.floats(1, 100))
def test_out_of_memory_below_the_budget(last, budget):
    peaks = [0.1 * batch if batch <= last else None for batch in range(1, 513)]

    largest, probes = searched(peaks, budget_gib=budget)

    assert largest == largest_of_all(peaks, budget_gib=budget)
    assert len(probes) <= 21


def test_a_probe_shows_that_the_next_batch_does_not_fit():
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


# search_modes: random modes, whose memory is a line over the batch


@st.composite
def random_modes(draw):
    """Name -> (GiB at batch 0, GiB a sequence), from the most to the least memory a sequence; speeds by name."""
    slopes = sorted(draw(st.lists(st.floats(0.01, 5), min_size=1, max_size=4)), reverse=True)
    lines = {f"mode {number}": (draw(st.floats(0, 10)), slope) for number, slope in enumerate(slopes)}
    speed = st.floats(1, 1.5) | st.sampled_from([1.0, 0.985, 0.975])
    return lines, {name: draw(speed) for name in lines}


def measure_lines(lines, speeds=None):
    """Measures without a model; also returns the measured batches by mode."""
    batches = {}

    def measure(mode, batch):
        batches.setdefault(mode, []).append(batch)
        return Measurement(lines[mode][0] + lines[mode][1] * batch, (speeds or {}).get(mode, 1.0) * batch**0.1)

    return measure, batches


@settings(deadline=None)
@given(
    modes=random_modes(),
    budget=st.floats(0.1, 60),
    bounds=st.sampled_from([(1, 64, 64), (1, 64, 1), (3, 9, 9), (3, 9, 3), (3, 9, 5), (5, 5, 5)]),
)
def test_each_mode_is_searched_until_enough_sequences_fit(modes, budget, bounds):
    lines, _ = modes
    smallest, largest, enough = bounds
    measure, batches = measure_lines(lines)

    searched = search_modes(measure, list(lines), smallest=smallest, largest=largest, budget_gib=budget, enough=enough)

    fitting = {
        name: max((b for b in range(smallest, largest + 1) if fixed + slope * b <= budget), default=0)
        for name, (fixed, slope) in lines.items()
    }
    names = list(lines)
    first_that_fits = next((number for number, name in enumerate(names) if fitting[name] >= enough), len(names) - 1)
    assert [mode.gradient_checkpointing for mode in searched] == names[: first_that_fits + 1]
    assert {mode.gradient_checkpointing: mode.largest for mode in searched} == {
        name: fitting[name] for name in names[: first_that_fits + 1]
    }
    assert batches == {mode.gradient_checkpointing: [probe.batch for probe in mode.probes] for mode in searched}


def test_after_a_mode_that_runs_out_of_memory_the_next_one_is_searched():
    def measure(mode, batch):
        return Measurement(0.1 * batch, 5.0) if mode == "full" else None

    none, full = search_modes(measure, ["none", "full"], smallest=1, largest=8, budget_gib=9, enough=8)

    assert (none.probes, none.largest) == ([Probe(1, False, None)], 0)
    assert full.largest == 8


def test_peak_of_a_mode_is_measured_or_on_the_line():
    mode = Mode("full", [Probe(1, True, 3.5), Probe(2, True, 4.0), Probe(8, True, 7.5), Probe(9, False, None)])

    assert [mode.peak_gib(batch) for batch in (1, 2, 8)] == [3.5, 4.0, 7.5]
    assert mode.peak_gib(4) == pytest.approx(4.0 + 2 * 3.5 / 6)
    assert Mode("full", [Probe(1, True, 3.5)]).peak_gib(4) is None


# choose


def mode_with_largest(largest, name="full", *, gib=1.0):
    probes = [Probe(1, True, gib / max(largest, 2)), Probe(largest, True, gib), Probe(largest + 1, False, None)]
    return Mode(name, probes if largest else [Probe(1, False, None)])


def never_timed(mode, batch):
    raise AssertionError(f"{mode} was timed, and there was nothing to choose from")


@settings(deadline=None)
@given(
    modes=random_modes(),
    budget=st.floats(1, 60),
    effective_batch=st.sampled_from([1, 4, 6, 13, 64, "auto"]),
    num_processes=st.integers(1, 9),
)
def test_the_fastest_candidate_is_chosen_or_the_smallest_of_equally_fast_ones(
    modes, budget, effective_batch, num_processes
):
    lines, speeds = modes
    measure, _ = measure_lines(lines, speeds)
    searched = search_modes(measure, list(lines), smallest=1, largest=32, budget_gib=budget, enough=32)

    def tokens_per_s(mode, batch):
        return measure(mode, batch).tokens_per_s

    if not any(mode.largest for mode in searched):
        with pytest.raises(InputError):
            choose(searched, effective_batch, tokens_per_s, num_processes)
        return

    choice = choose(searched, effective_batch, tokens_per_s, num_processes)

    def gib(mode, batch):
        return lines[mode][0] + lines[mode][1] * batch

    candidates = {
        mode.gradient_checkpointing: per_device_batch(mode.largest, effective_batch, num_processes)
        for mode in searched
        if mode.largest
    }
    chosen, batch = choice.gradient_checkpointing, choice.per_device_batch
    assert candidates[chosen] == batch
    assert gib(chosen, batch) <= budget
    fastest = max(tokens_per_s(*candidate) for candidate in candidates.items())
    as_fast = [candidate for candidate in candidates.items() if tokens_per_s(*candidate) >= AS_FAST * fastest]
    assert (chosen, batch) in as_fast
    assert gib(chosen, batch) == pytest.approx(min(gib(*candidate) for candidate in as_fast), rel=1e-9)


@given(largest=st.integers(1, 70), effective_batch=st.integers(1, 200), num_processes=st.integers(1, 9))
def test_a_step_has_the_fewest_micro_batches_that_fit_of_equal_sizes(largest, effective_batch, num_processes):
    modes = [mode_with_largest(largest)]

    _, batch, accumulation = choose(modes, effective_batch, never_timed, num_processes)

    share = math.ceil(effective_batch / num_processes)  # of the process with the most sequences
    assert 1 <= batch <= largest
    assert accumulation == math.ceil(share / largest)
    assert (accumulation - 1) * batch < share <= accumulation * batch
    assert accumulation * batch - share < accumulation  # no smaller micro-batch is enough


@pytest.mark.parametrize(
    ("speed_of_full", "chosen"), [(0.5, "none"), (AS_FAST - 0.01, "none"), (AS_FAST + 0.01, "full"), (1.0, "full")]
)
def test_less_memory_decides_only_among_equally_fast_ones(speed_of_full, chosen):
    modes = [mode_with_largest(8, "none", gib=4.0), mode_with_largest(64, "full", gib=4.0)]
    speeds = {("none", 4): 1000.0, ("full", 4): 1000.0 * speed_of_full}

    assert choose(modes, 4, lambda *candidate: speeds[candidate], 1) == (chosen, 4, 1)


def test_each_mode_is_timed_at_its_micro_batch():
    timed = []
    modes = [mode_with_largest(3, "none"), mode_with_largest(0, "mlp"), mode_with_largest(9, "full")]

    def tokens_per_s(mode, batch):
        timed.append((mode, batch))
        return {"none": 1.0, "full": 2.0}[mode]

    assert choose(modes, 8, tokens_per_s, 1) == ("full", 8, 1)
    assert timed == [("none", 3), ("full", 8)]


def test_mode_that_cannot_be_timed_is_not_chosen():
    modes = [mode_with_largest(8, "none"), mode_with_largest(16, "full")]

    assert choose(modes, 8, lambda mode, batch: {"none": 7.0, "full": 0.0}[mode], 1) == ("none", 8, 1)


@pytest.mark.parametrize(
    ("largest", "effective_batch", "num_processes", "chosen"),
    [
        (9, 4, 1, (4, 1)),
        (3, 4, 1, (2, 2)),
        (9, 32, 1, (8, 4)),
        (19, 64, 1, (16, 4)),
        (64, 64, 1, (64, 1)),
        (12, 13, 1, (7, 2)),  # a prime: the second micro-batch has 6
        (1, 6, 1, (1, 6)),
        (64, 64, 4, (16, 1)),
        (7, 64, 4, (6, 3)),
        (64, 10, 4, (3, 1)),  # 2 of the processes compute 3 sequences, 2 compute 2
        (64, 1, 4, (1, 1)),
        (19, "auto", 1, (19, 1)),
        (19, "auto", 4, (19, 1)),
    ],
)
def test_the_micro_batch_of_an_effective_batch(largest, effective_batch, num_processes, chosen):
    assert choose([mode_with_largest(largest)], effective_batch, never_timed, num_processes) == ("full", *chosen)


@pytest.mark.parametrize(
    ("peak", "what_happens"), [(8.125, "needs 8.12 GiB"), (0.0042, "needs 0.0042 GiB"), (None, "runs out of memory")]
)
@pytest.mark.parametrize("effective_batch", [4, "auto"])
def test_an_error_if_nothing_fits(peak, what_happens, effective_batch):
    modes = [Mode("none", [Probe(2, False, None)]), Mode("full", [Probe(2, False, peak)])]

    with pytest.raises(InputError) as caught:
        choose(modes, effective_batch, never_timed, 1)

    assert str(caught.value) == (
        f"find_batch.min: 2 sequences do not fit: a training step {what_happens}. Lower find_batch.min, "
        "compute.seq_length or a high lora.r, set train.gradient_checkpointing to auto, or raise "
        "find_batch.cpu_memory_gib (on a GPU: raise find_batch.memory_gib or lower find_batch.gpu_headroom_gib)."
    )
