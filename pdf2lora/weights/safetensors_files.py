"""Writes safetensors files without a whole weight in memory, and maps weights to change them in place."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdf2lora.runtime.files import write_json
from pdf2lora.weights.safetensors_header import read_header
from pdf2lora.weights.sharded_weights import ShardedWeight

Progress = Callable[[int, int], None]  # bytes written, bytes in all

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
GIB = 2**30
METADATA = "__metadata__"  # an entry of the header that is not a weight
COPY_BYTES = 16 * 2**20


def plan_files(weights: Mapping[str, ShardedWeight], max_shard_gib: float) -> dict[str, dict[str, ShardedWeight]]:
    """Assigns the weights, in order, to files of at most max_shard_gib GiB: {file name: {weight name: weight}}."""
    groups: list[dict[str, ShardedWeight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.num_bytes > max_shard_gib * GIB:
            groups.append({})
            size = 0
        groups[-1][name] = weight
        size += weight.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_weights(target: Path, files: Mapping[str, Mapping[str, ShardedWeight]], progress: Progress) -> None:
    """Writes safetensors files to the folder `target`, and their index if there are several.

    The header is written first, because the offsets follow from the shapes. Then the weights are written in slabs.
    safetensors.serialize_file is not used, because it needs all weights of a file in memory.
    """
    total = sum(weight.num_bytes for weights in files.values() for weight in weights.values())
    done = 0
    for file_name, weights in files.items():
        header: dict[str, object] = {METADATA: {"format": "pt"}}
        end = 0
        for name, weight in weights.items():
            start, end = end, end + weight.num_bytes
            dtype = SAFETENSORS_DTYPES[weight.dtype]
            header[name] = {"dtype": dtype, "shape": weight.shape, "data_offsets": (start, end)}
        with (target / file_name).open("wb") as file:
            file.write(_encode(header))
            for weight in weights.values():
                for slab in weight.slabs():
                    file.write(slab.view(torch.uint8).numpy().data)
                    done += slab.nbytes
                    progress(done, total)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, weights in files.items() for name in weights}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def copy_with_names(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """Copies a safetensors file with other names of the weights. Their bytes do not change."""
    with source.open("rb") as old, target.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        new.write(_encode({name if name == METADATA else rename(name): entry for name, entry in header.items()}))
        shutil.copyfileobj(old, new, COPY_BYTES)


def _encode(header: Mapping[str, object]) -> bytes:
    """The start of a safetensors file: the length of the header, and the header."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # keeps the weights aligned
    return struct.pack("<Q", len(encoded)) + encoded


def mapped_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and weights of a safetensors file, in 16 or 32 bits. A change of a weight changes the file."""
    for name, entry in read_header(file).items():
        if entry.dtype not in TORCH_DTYPES:
            continue
        data = np.memmap(file, dtype=np.uint8, mode="r+", offset=entry.offset, shape=(entry.num_bytes,))
        yield name, torch.from_numpy(data).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
        data.flush()
