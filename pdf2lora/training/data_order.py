"""Selects the sequences of each optimizer step, and divides them among the processes.

The order depends only on the seed. The number of processes and the per-device batch only divide a step's sequences.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
REPLAY_STREAM = 2**32 - 1  # of random numbers; no epoch has this number


class MicroBatchIndices(NamedTuple):
    """The sequences of one micro-batch, and the position of the first one among the sequences of the step."""

    indices: Indices
    first_sequence: int


@dataclass(frozen=True)
class DataOrder:
    """The sequences of each optimizer step, in a new order in each epoch.

    Sequences 0 to num_sequences - 1 are the corpus; the num_replay_sequences after them are replay text. An epoch has
    all sequences of the corpus and num_replay sequences of replay text. The next epoch has other replay sequences,
    until all were used. The last step of an epoch is smaller if effective_batch does not divide the epoch.

    replay_share: share of replay sequences in an epoch. It is smaller if there are too few replay sequences.
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
        num_for_share = round(self.replay_share / (1 - self.replay_share) * self.num_sequences)
        return min(num_for_share, self.num_replay_sequences)

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

    def indices(self, step: int) -> Indices:
        """The indices of the sequences of a step. The first step is 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_in_epoch, self.seed, epoch)
        indices = order[place * self.effective_batch : (place + 1) * self.effective_batch]
        if not self.num_replay:
            return indices
        replay = _epoch_order(self.num_replay_sequences, self.seed, REPLAY_STREAM)
        number = epoch * self.num_replay + indices - self.num_sequences  # counts replay sequences over all epochs
        replay_indices = self.num_sequences + replay[number % self.num_replay_sequences]
        return np.where(indices < self.num_sequences, indices, replay_indices)


@lru_cache(maxsize=2)
def _epoch_order(num_sequences: int, seed: int, epoch: int) -> Indices:
    """Returns a random order of all sequences. Cached, because two million sequences take 0.2 s."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def micro_batches(
    indices: Indices, per_device_batch: int, *, process: int, num_processes: int
) -> list[MicroBatchIndices]:
    """Returns one process's share of a step as micro-batches of at most per_device_batch sequences.

    The shares of two processes differ by at most one sequence. A process without a sequence gets an empty list.
    """
    begin, end = (len(indices) * part // num_processes for part in (process, process + 1))
    starts = range(begin, end, per_device_batch)
    return [MicroBatchIndices(indices[start : min(start + per_device_batch, end)], start) for start in starts]
