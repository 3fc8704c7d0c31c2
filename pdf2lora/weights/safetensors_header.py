"""The header of a safetensors file, read without torch.

A file is an 8-byte little-endian length, a JSON header of that length, then the bytes of the weights one after the
other. The header maps each name to dtype, shape and the offsets of its first byte and of the byte after its last,
counted from the end of the header (huggingface/safetensors, README.md).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pdf2lora.errors import InputError
from pdf2lora.weights.lfs_pointer import require_no_pointer

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredWeight:
    """One entry of a header."""

    dtype: str
    """safetensors' name: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    offset: int
    """In bytes, from the start of the file."""
    num_bytes: int
    file: Path

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the weight, at most CHUNK_BYTES at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            for start in range(0, self.num_bytes, CHUNK_BYTES):
                yield stream.read(min(CHUNK_BYTES, self.num_bytes - start))


def read_header(file: Path) -> dict[str, StoredWeight]:
    """{name: entry} of a safetensors file. No weight is read.

    Raises InputError if the file is truncated or is not a safetensors file.
    """
    require_no_pointer(file)
    try:
        with safe_open(file, framework="np"):  # checks the header, the offsets and the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: this is not a safetensors file, or it is truncated ({error}). Download the file again."
        ) from None
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            shape, offset = tuple(entry["shape"]), 8 + length + start
            weights[name] = StoredWeight(entry["dtype"], shape, offset, end - start, file)
    return weights
