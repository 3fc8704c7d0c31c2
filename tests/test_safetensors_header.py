"""The header of a safetensors file."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdf2lora.errors import InputError
from pdf2lora.weights.safetensors_header import read_header


def test_shapes_and_dtypes_are_read(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, file, {"format": "pt"})

    header = read_header(file)

    assert {name: (weight.dtype, weight.shape, weight.num_bytes) for name, weight in header.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    for weight in header.values():
        assert weight.offset + weight.num_bytes <= file.stat().st_size


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**62),
        (b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}', None),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}', None),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None),
        (b"[]", None),
        (b"", None),
    ],
    ids=["length", "shape", "offsets", "truncated", "list", "empty"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", length or len(header)) + header + b"abcd")

    with pytest.raises(InputError, match=r"w.safetensors: this is not a safetensors file, or it is truncated"):
        read_header(file)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.bfloat16)}, file)
    code = (
        "import sys, pathlib; from pdf2lora.weights.safetensors_header import read_header; "
        f"read_header(pathlib.Path({str(file)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
