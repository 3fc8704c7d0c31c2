"""Safetensors files: one writer and one in-place reader."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdf2lora.weights.json_files import write_json
from pdf2lora.weights.names import DTYPES, TORCH_DTYPES

Progress = Callable[[int, int], None]  # bytes written, bytes in all


SLAB_BYTES = 64 * 2**20  # what is held in memory at once


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model; its `parts`, one from each shard, are joined along `split_dim` when rows are read.

    `head_dim` is set where rotary pairs change places.
    """

    parts: tuple[Tensor, ...]
    split_dim: int = 0
    head_dim: int | None = None

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
        """The weight from its first row to its last, contiguous, about SLAB_BYTES (at least one head) at a time."""
        unit = self.head_dim or 1
        step = unit * max(1, SLAB_BYTES * self.shape[0] // (self.num_bytes * unit))
        for start in range(0, self.shape[0], step):
            rows = self.rows(start, min(start + step, self.shape[0]))
            yield (permute_rotary(rows, self.head_dim) if self.head_dim else rows).contiguous()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the joined weight: a view of the mapped file where one part holds them, else a copy."""
        if self.split_dim == 1:
            pieces = [part[start:stop] for part in self.parts]
        else:
            height = self.parts[0].shape[0]
            holders = range(start // height, (stop - 1) // height + 1)
            pieces = [self.parts[n][max(start - n * height, 0) : min(stop - n * height, height)] for n in holders]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.split_dim)


def permute_rotary(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each head from Meta's rotary pairs (2i, 2i + 1) to Hugging Face's (i, i + head_dim / 2).

    rows: (heads * head_dim, hidden), of the projection to queries or keys; the result has the same shape.
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def plan_files(weights: Mapping[str, Weight], max_shard_gib: float) -> dict[str, dict[str, Weight]]:
    """Deals the weights out, in order, to files of at most max_shard_gib GiB: {file name: {weight name: Weight}}."""
    groups: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.num_bytes > max_shard_gib * 2**30:
            groups.append({})
            size = 0
        groups[-1][name] = weight
        size += weight.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_weights(target: Path, files: Mapping[str, Mapping[str, Weight]], progress: Progress) -> None:
    """Writes safetensors files into the folder `target`, and their index if there are several.

    A file is an 8-byte little-endian length, a JSON header of that length, then the bytes of the weights one after the
    other (huggingface/safetensors, README.md). The offsets follow from the shapes, so the header can go first and the
    weights a slab at a time; safetensors.serialize_file wants all weights of a file ready in memory.
    """
    total = sum(weight.num_bytes for weights in files.values() for weight in weights.values())
    done = 0
    for file_name, weights in files.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, weight in weights.items():
            start, end = end, end + weight.num_bytes
            header[name] = {"dtype": DTYPES[weight.dtype], "shape": weight.shape, "data_offsets": (start, end)}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # keeps the weights aligned
        with (target / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for weight in weights.values():
                for slab in weight.slabs():
                    file.write(slab.view(torch.uint8).numpy().data)
                    done += slab.nbytes
                    progress(done, total)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, weights in files.items() for name in weights}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def mapped_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a safetensors file; what is written to one of them is written to the file.

    The file begins with the length of its header, 8 bytes, and the header, JSON: name -> dtype, shape and the place of
    the first and after the last byte, counted from the header's end (huggingface/safetensors, README.md).
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            place = 8 + length + begin
            data = np.memmap(file, dtype=np.uint8, mode="r+", offset=place, shape=(end - begin,))
            yield name, torch.from_numpy(data).view(TORCH_DTYPES[entry["dtype"]]).view(entry["shape"])
            data.flush()
