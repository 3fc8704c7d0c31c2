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
REPLAY_STREAM = 2**32 - 1  # of random numbers; no epoch has this number


class MicroBatchRows(NamedTuple):
    """The sequences of one micro-batch, and the place of the first one among the sequences of the step."""

    rows: Rows
    first: int


@dataclass(frozen=True)
class DataOrder:
    """The sequences of each optimizer step, in a new order in each epoch.

    An epoch has all num_sequences of the corpus and num_replay of the num_replay_sequences that follow them. The replay
    sequences of the next epoch are others, until all were used. The last step of an epoch has fewer sequences where
    effective_batch does not divide their number.

    replay_share: of the sequences of an epoch; less where there are too few replay sequences.
    """

    num_sequences: int
    effective_batch: int
    num_train_epochs: float
    seed: int
    num_replay_sequences: int = 0
    replay_share: float = 0.0

    @property
    def num_replay(self) -> int:
        """Replay sequences of one epoch."""
        wanted = round(self.replay_share / (1 - self.replay_share) * self.num_sequences)
        return min(wanted, self.num_replay_sequences)

    @property
    def num_in_epoch(self) -> int:
        return self.num_sequences + self.num_replay

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_in_epoch / self.effective_batch)

    @property
    def num_steps(self) -> int:
        # In decimal: 1.1 epochs of 110 steps are 121 steps, but 1.1 * 110 in floating point is above 121.
        return math.ceil(Fraction(str(self.num_train_epochs)) * self.steps_per_epoch)

    def rows(self, step: int) -> Rows:
        """The numbers of the sequences of a step; steps count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_in_epoch, self.seed, epoch)
        rows = order[place * self.effective_batch : (place + 1) * self.effective_batch]
        if not self.num_replay:
            return rows
        replay = _epoch_order(self.num_replay_sequences, self.seed, REPLAY_STREAM)
        number = epoch * self.num_replay + rows - self.num_sequences  # of the replay sequences since the first epoch
        replay_rows = self.num_sequences + replay[number % self.num_replay_sequences]
        return np.where(rows < self.num_sequences, rows, replay_rows)


@lru_cache(maxsize=2)
def _epoch_order(num_sequences: int, seed: int, epoch: int) -> Rows:
    """All sequences in the order of an epoch, or of the replay text. Cached: two million sequences take 0.2 s."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def micro_batches(rows: Rows, per_device_batch: int, *, process: int, num_processes: int) -> list[MicroBatchRows]:
    """One process's part of a step, at most per_device_batch sequences at a time.

    The parts differ by one sequence at most. A process without a sequence gets an empty list.
    """
    begin, end = (len(rows) * part // num_processes for part in (process, process + 1))
    starts = range(begin, end, per_device_batch)
    return [MicroBatchRows(rows[start : min(start + per_device_batch, end)], start) for start in starts]
