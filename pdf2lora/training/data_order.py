"""Which sequences each optimizer step sees, and which of them each process computes.

The order depends on the seed alone. The number of processes and the per-device batch only divide a step's sequences.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class MicroBatchRows(NamedTuple):
    """The sequences of one micro-batch, and the place of the first one among the sequences of the step."""

    rows: Rows
    first: int


@dataclass(frozen=True)
class DataOrder:
    """The sequences of each optimizer step, in a new order in each epoch.

    The last step of an epoch has fewer sequences where effective_batch does not divide num_sequences.
    """

    num_sequences: int
    effective_batch: int
    num_train_epochs: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_sequences / self.effective_batch)

    @property
    def num_steps(self) -> int:
        # In decimal: 1.1 epochs of 110 steps are 121 steps, but 1.1 * 110 in floating point is above 121.
        return math.ceil(Fraction(str(self.num_train_epochs)) * self.steps_per_epoch)

    def rows(self, step: int) -> Rows:
        """The numbers of the sequences of a step; steps count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_sequences, self.seed, epoch)
        return order[place * self.effective_batch : (place + 1) * self.effective_batch]


@lru_cache(maxsize=1)
def _epoch_order(num_sequences: int, seed: int, epoch: int) -> Rows:
    """All sequences in the order of an epoch. Cached, because two million sequences take 0.2 s."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def micro_batches(rows: Rows, per_device_batch: int, *, process: int, num_processes: int) -> list[MicroBatchRows]:
    """One process's part of a step, at most per_device_batch sequences at a time.

    The parts differ by one sequence at most. A process without a sequence gets an empty list.
    """
    begin, end = (len(rows) * part // num_processes for part in (process, process + 1))
    starts = range(begin, end, per_device_batch)
    return [MicroBatchRows(rows[start : min(start + per_device_batch, end)], start) for start in starts]
