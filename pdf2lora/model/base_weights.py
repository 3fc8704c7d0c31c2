"""Single weights of models/base. The whole model does not have to fit into memory."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdf2lora.model.device import device


class BaseWeights:
    """The weights of all safetensors files of a folder, by name. The files stay open."""

    def __init__(self, base: Path):
        self.files: dict[str, Any] = {}
        for path in sorted(base.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Reads one weight to the device."""
        weight: Tensor = self.files[name].get_tensor(name)
        return weight.to(device=device(), dtype=dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def is_unquantized(self, name: str) -> bool:
        """Whether the weight exists and has 16 or 32 bits."""
        return name in self.files and self.files[name].get_slice(name).get_dtype() in ("F32", "F16", "BF16")
