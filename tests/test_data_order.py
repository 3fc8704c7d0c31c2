"""The sequences of each step, for every number of sequences, batch and process."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdf2lora.training.data_order import DataOrder, micro_batches

sizes = st.integers(1, 40)


@settings(deadline=None)
@given(num_sequences=sizes, effective_batch=sizes, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_each_epoch_has_every_sequence_once(num_sequences: int, effective_batch: int, seed: int, epoch: int) -> None:
    order = DataOrder(num_sequences, effective_batch, 4, seed)

    first = epoch * order.steps_per_epoch
    steps = [order.indices(step) for step in range(first, first + order.steps_per_epoch)]

    assert sorted(np.concatenate(steps)) == list(range(num_sequences))
    assert {len(indices) for indices in steps[:-1]} <= {effective_batch}
    assert len(steps[-1]) == num_sequences % effective_batch or len(steps[-1]) == min(effective_batch, num_sequences)
    assert order.num_steps == 4 * math.ceil(num_sequences / effective_batch)


@settings(deadline=None)
@given(num_sequences=sizes, per_device_batch=sizes, num_processes=st.integers(1, 9))
def test_processes_and_micro_batches_divide_a_step(
    num_sequences: int, per_device_batch: int, num_processes: int
) -> None:
    indices = np.random.default_rng(num_sequences).permutation(100)[:num_sequences]

    parts = [
        micro_batches(indices, per_device_batch, process=process, num_processes=num_processes)
        for process in range(num_processes)
    ]

    together = list(itertools.chain.from_iterable(parts))
    assert np.concatenate([part.indices for part in together]).tolist() == indices.tolist()
    for part in together:
        assert part.indices.tolist() == indices[part.first_sequence : part.first_sequence + len(part.indices)].tolist()
        assert 1 <= len(part.indices) <= per_device_batch
    counts = [sum(len(part.indices) for part in parts_of_process) for parts_of_process in parts]
    assert max(counts) - min(counts) <= 1
    for count, parts_of_process in zip(counts, parts, strict=True):
        assert len(parts_of_process) == math.ceil(count / per_device_batch)


def test_fewer_sequences_than_processes_leave_processes_without_any() -> None:
    parts = [micro_batches(np.array([7, 3]), 4, process=process, num_processes=5) for process in range(5)]

    assert sorted(len(part) for part in parts) == [0, 0, 0, 1, 1]


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        order = DataOrder(20, 3, 5, seed)
        first = number * order.steps_per_epoch
        return np.concatenate([order.indices(first + step) for step in range(order.steps_per_epoch)]).tolist()

    orders = [epoch(number, seed) for number in (0, 1) for seed in (0, 1)]

    assert len({tuple(order) for order in orders}) == 4
    assert orders == [epoch(number, seed) for number in (0, 1) for seed in (0, 1)]
    assert list(range(20)) not in orders


@pytest.mark.parametrize(
    ("num_sequences", "effective_batch", "num_train_epochs", "num_steps"),
    [(8, 2, 1.0, 4), (8, 2, 0.25, 1), (8, 2, 0.26, 2), (8, 2, 1.5, 6), (9, 2, 1.0, 5), (9, 2, 0.01, 1),
     (500, 10, 1.1, 55), (100, 10, 0.7, 7), (3, 8, 2.0, 2)],
)  # fmt: skip
def test_a_fraction_of_an_epoch_ends_in_its_middle(
    num_sequences: int, effective_batch: int, num_train_epochs: float, num_steps: int
) -> None:
    assert DataOrder(num_sequences, effective_batch, num_train_epochs, 0).num_steps == num_steps


def test_the_end_of_training_does_not_change_the_order() -> None:
    long, short = (DataOrder(9, 2, num_train_epochs, 3) for num_train_epochs in (3, 1.5))

    assert all(long.indices(step).tolist() == short.indices(step).tolist() for step in range(short.num_steps))


@settings(deadline=None)
@given(
    num_sequences=sizes,
    num_replay_sequences=st.integers(0, 40),
    share=st.floats(0.01, 0.9),
    effective_batch=sizes,
    seed=st.integers(0, 2**32),
)
def test_an_epoch_has_the_corpus_once_and_its_share_of_replay(
    num_sequences: int, num_replay_sequences: int, share: float, effective_batch: int, seed: int
) -> None:
    order = DataOrder(num_sequences, effective_batch, 3, seed, num_replay_sequences, share)
    wanted = round(share / (1 - share) * num_sequences)

    used: list[int] = []
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        indices = np.concatenate([order.indices(first + step) for step in range(order.steps_per_epoch)])
        replay = indices[indices >= num_sequences]
        assert sorted(indices[indices < num_sequences]) == list(range(num_sequences))
        assert len(replay) == len(set(replay)) == min(wanted, num_replay_sequences)
        used += replay.tolist()
    assert set(used) <= set(range(num_sequences, num_sequences + num_replay_sequences))
    assert len(set(used)) == min(3 * order.num_replay, num_replay_sequences)  # others in each epoch
    assert order.num_steps == 3 * math.ceil((num_sequences + order.num_replay) / effective_batch)


def test_without_replay_text_the_order_is_the_same() -> None:
    plain, with_share = DataOrder(9, 2, 2, 5), DataOrder(9, 2, 2, 5, num_replay_sequences=0, replay_share=0.5)

    assert all(plain.indices(step).tolist() == with_share.indices(step).tolist() for step in range(plain.num_steps))
    assert plain.num_steps == with_share.num_steps


def test_replay_is_mixed_over_the_epoch() -> None:
    order = DataOrder(900, 10, 1, 0, 100, 0.1)

    shares = [float((order.indices(step) >= 900).mean()) for step in range(order.num_steps)]

    assert order.num_steps == 100
    assert 0.05 < np.mean(shares[:50]) < 0.15
    assert max(shares) <= 0.5
