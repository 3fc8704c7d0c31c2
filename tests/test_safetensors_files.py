"""The writer of safetensors files, and weights mapped for changes in place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pdf2lora.weights.safetensors_files import mapped_weights, plan_files, write_weights
from pdf2lora.weights.sharded_weights import ShardedWeight

GIB = 2**30
WEIGHTS = {
    name: torch.arange(number, number + 48, dtype=dtype).view(6, 8)
    for number, (name, dtype) in enumerate(
        {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float32}.items()
    )
}
SHARDED = {name: ShardedWeight((weight,)) for name, weight in WEIGHTS.items()}


def write(folder: Path, max_shard_gib: float) -> list[tuple[int, int]]:
    """Gives the calls of progress."""
    calls: list[tuple[int, int]] = []
    write_weights(folder, plan_files(SHARDED, max_shard_gib), lambda done, total: calls.append((done, total)))
    return calls


def test_one_file_is_read_by_safetensors(tmp_path: Path) -> None:
    write(tmp_path, 1)

    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    weights = load_file(tmp_path / "model.safetensors")
    assert list(weights) == list(WEIGHTS)
    assert all(
        weights[name].dtype == WEIGHTS[name].dtype and torch.equal(weights[name], WEIGHTS[name]) for name in weights
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0  # aligned weights


@pytest.mark.parametrize(
    ("limit_bytes", "groups"),
    [(10**6, ["abcd"]), (300, ["ab", "cd"]), (200, ["a", "bc", "d"]), (1, ["a", "b", "c", "d"])],
)
def test_files_stay_below_the_limit(tmp_path: Path, limit_bytes: int, groups: list[str]) -> None:
    write(tmp_path, limit_bytes / GIB)

    files = sorted(tmp_path.glob("*.safetensors"))
    assert ["".join(load_file(file)) for file in files] == groups
    if len(groups) > 1:
        assert files[0].name == f"model-00001-of-{len(groups):05}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in WEIGHTS.values())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls = write(tmp_path, 300 / GIB)

    total = sum(weight.nbytes for weight in WEIGHTS.values())
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_a_change_of_a_mapped_weight_changes_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")

    for name, weight in mapped_weights(tmp_path / "w.safetensors"):
        weight += 1 if name == "a" else 5

    weights = load_file(tmp_path / "w.safetensors")
    assert torch.equal(weights["a"], torch.full((2, 3), 2.0))
    assert torch.equal(weights["b"], torch.full((4,), 5, dtype=torch.bfloat16))
