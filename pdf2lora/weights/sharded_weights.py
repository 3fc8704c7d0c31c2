"""Weights in Meta's model-parallel shards. Their rows are joined and reordered when they are read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB_BYTES = 64 * 2**20  # of a weight that are in memory at once


@dataclass(frozen=True)
class ShardedWeight:
    """One weight of the whole model."""

    parts: tuple[Tensor, ...]
    """One from each shard."""
    split_dim: int = 0
    """The dimension along which the parts are joined."""
    head_dim: int | None = None
    """Features of a head if its rotary pairs must be reordered, else None."""

    @property
    def shape(self) -> tuple[int, ...]:
        part = self.parts[0].shape
        return tuple(size * len(self.parts) if dim == self.split_dim else size for dim, size in enumerate(part))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slabs(self) -> Iterator[Tensor]:
        """Yields the weight in contiguous slabs of rows, of about SLAB_BYTES, with at least one head each."""
        unit = self.head_dim or 1
        step = unit * max(1, SLAB_BYTES * self.shape[0] // (self.num_bytes * unit))
        for start in range(0, self.shape[0], step):
            rows = self.rows(start, min(start + step, self.shape[0]))
            yield (permute_rotary(rows, self.head_dim) if self.head_dim else rows).contiguous()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the joined weight: a view of the mapped file if they are in one part, else a copy."""
        if self.split_dim == 1:
            pieces = [part[start:stop] for part in self.parts]
        else:
            height = self.parts[0].shape[0]
            holders = range(start // height, (stop - 1) // height + 1)
            pieces = [self.parts[n][max(start - n * height, 0) : min(stop - n * height, height)] for n in holders]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.split_dim)

    def equals(self, other: "ShardedWeight") -> bool:
        """Whether both have the same numbers. Both must have the same shape and the same split into parts."""
        return all(torch.equal(one, two) for one, two in zip(self.slabs(), other.slabs(), strict=True))


def permute_rotary(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each head from Meta's rotary pairs (2i, 2i + 1) to Hugging Face's (i, i + head_dim / 2).

    rows: (heads * head_dim, hidden), of the projection to queries or keys; the result has the same shape.
    Source: transformers 4.47, convert_llama_weights_to_hf.py (the last converter it shipped).
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
