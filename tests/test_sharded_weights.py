"""Weights joined from model-parallel shards."""

import pytest
import torch

from pdf2lora.weights import sharded_weights
from pdf2lora.weights.sharded_weights import ShardedWeight, permute_rotary

WHOLE = torch.arange(24 * 10, dtype=torch.float32).view(24, 10)


@pytest.mark.parametrize("slab_bytes", [1, 100, 400, 10**6])
@pytest.mark.parametrize(("num_parts", "split_dim"), [(1, 0), (2, 0), (3, 0), (2, 1), (5, 1)])
@pytest.mark.parametrize("head_dim", [None, 4])
def test_slabs_are_the_joined_weight(
    monkeypatch: pytest.MonkeyPatch, slab_bytes: int, num_parts: int, split_dim: int, head_dim: int | None
) -> None:
    monkeypatch.setattr(sharded_weights, "SLAB_BYTES", slab_bytes)
    weight = ShardedWeight(WHOLE.chunk(num_parts, split_dim), split_dim, head_dim)

    joined = torch.cat(list(weight.slabs()))

    assert weight.shape == WHOLE.shape
    assert weight.num_bytes == WHOLE.nbytes
    assert torch.equal(joined, permute_rotary(WHOLE, head_dim) if head_dim else WHOLE)


def test_pairs_become_halves() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four

    assert permute_rotary(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_equality_is_exact() -> None:
    other = WHOLE.clone()
    other[-1, -1] += 1e-3

    assert ShardedWeight((WHOLE,)).equals(ShardedWeight((WHOLE.clone(),)))
    assert not ShardedWeight((WHOLE,)).equals(ShardedWeight((other,)))
