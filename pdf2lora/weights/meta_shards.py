"""Meta's consolidated.NN.pth files, opened without running code."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from pdf2lora.errors import InputError

Shard = dict[str, Tensor]  # Meta's name -> weight


def read_shards(source: Path) -> list[Shard]:
    """Opens consolidated.00.pth, consolidated.01.pth, ... The weights are memory-mapped.

    Files in the format of torch before 1.6 cannot be mapped. They are read into memory.

    Raises InputError if a number is missing, or a file is damaged or contains code.
    """
    names = {path.name for path in source.glob("consolidated.[0-9][0-9].pth")}
    for number in range(max(1, len(names))):
        if shard_name(number) not in names:
            raise InputError(
                f"{source / shard_name(number)}: the file is missing. Download all shards of the source model."
            )
    return [_load_shard(source / name) for name in sorted(names)]


def shard_name(number: int) -> str:
    return f"consolidated.{number:02}.pth"


def _load_shard(path: Path) -> Shard:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        loaded = torch.load(path, mmap=is_zip, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many types for damaged bytes, from EOFError to UnicodeDecodeError
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise InputError(
                f"{path}: the file is refused, because it contains code ({code[1]}). "
                "Use a file that torch.load(weights_only=True) accepts."
            ) from None
        raise InputError(
            f"{path}: this is not a torch file, or it is truncated ({type(error).__name__}). Download the file again."
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(weight, Tensor) for weight in loaded.values()):
        raise InputError(f"{path}: the file must have only weights by name. Use Meta's original file.")
    # Llama 1 and 2 store the rotary frequencies, which follow from rope_theta.
    return {str(name): weight for name, weight in loaded.items() if not str(name).endswith("rope.freqs")}
