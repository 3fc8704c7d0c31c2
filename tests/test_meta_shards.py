"""Meta's files of weights: mapped, of an old format, damaged, with code in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_meta import convert_default, write_tiny_meta

from pdf2lora.errors import InputError
from pdf2lora.weights.meta_shards import read_shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_are_mapped_not_read(source: Path) -> None:
    write_tiny_meta(source, "3.2", num_shards=2)
    shards = read_shards(source)
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(source / f"consolidated.0{n}.pth") in mapped for n in range(len(shards)))


def test_old_torch_format(source: Path, tmp_path: Path, target: Path) -> None:
    weights, _ = write_tiny_meta(source, "3.2", dtype=torch.bfloat16)
    (other := tmp_path / "other").mkdir()
    convert_default(source, other)
    torch.save(weights, source / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    convert_default(source, target)
    assert (target / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "consolidated.00.pth").unlink(), ["consolidated.00.pth: the file is missing", "all shards"]),
        (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"), ["consolidated.01.pth: the file is"]),
        (cut("consolidated.01.pth"), ["consolidated.01.pth: this is not a torch file, or it is truncated"]),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b""), ["consolidated.00.pth: this is not a torch file"]),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b"\x80\x02junk"), ["this is not a torch file"]),
        (lambda f: torch.save([1, 2], f / "consolidated.00.pth"), ["must have only weights by name"]),
    ],
)
def test_a_damaged_file_is_refused(source: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    write_tiny_meta(source, "3.2", num_shards=2)
    damage(source)

    with pytest.raises(InputError) as caught:
        read_shards(source)

    assert all(word in str(caught.value) for word in [str(source), *words])


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(source: Path, target: Path, zipped: bool) -> None:
    weights, _ = write_tiny_meta(source, "3.2")
    proof = target.parent / "code-ran"
    weights["norm.weight"] = RunsCode(proof)
    torch.save(weights, source / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)

    with pytest.raises(InputError, match=r"00.pth: the file is refused, because it contains code \(.*mkdir\)"):
        convert_default(source, target)
    assert not proof.exists()


class RunsCode:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)
