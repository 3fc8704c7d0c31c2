"""A model without quantization, also where it does not fit on the GPU."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pdf2lora.model.device import compute_dtype
from pdf2lora.model.loading import load_base
from pdf2lora.params import Compute, Quantization

FREE_SHARE = 0.8  # of the free GPU memory that weights can use; the rest is for activations and logits


def load_unquantized(folder: Path, quantization: Quantization, compute: Compute) -> PreTrainedModel:
    """The model in compute.compute_dtype, frozen.

    Layers that do not fit on the GPU stay in host memory. accelerate copies each of them to the GPU when a forward
    pass needs it.
    """
    unquantized = Quantization(**(quantization.model_dump() | {"bits": 16}))
    fits = not torch.cuda.is_available() or _weights_gib(folder, compute) < _free_gib()
    return load_base(folder, unquantized, compute, max_gpu_gib=None if fits else _free_gib())


def _weights_gib(folder: Path, compute: Compute) -> float:
    """The weights in compute.compute_dtype; the files have 16 bits a weight."""
    num_weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
    return num_weights * compute_dtype(compute).itemsize / 2**30


def _free_gib() -> float:
    return FREE_SHARE * torch.cuda.mem_get_info()[0] / 2**30
