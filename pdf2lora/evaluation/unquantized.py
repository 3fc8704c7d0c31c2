"""The forward pass of a model without quantization, even if the model is larger than the GPU."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from pdf2lora.model.device import compute_dtype, device
from pdf2lora.model.forward import Forward, build_forward
from pdf2lora.model.kernel_choice import Kernels
from pdf2lora.model.loading import load_base, read_config
from pdf2lora.params import UNQUANTIZED_GPU_SHARE, Compute, Quantization

Placement = dict[str, torch.device | str]  # name of a module -> its device


def build_unquantized(folder: Path, quantization: Quantization, compute: Compute, kernels: Kernels) -> Forward:
    """The forward pass of the frozen model in compute.compute_dtype.

    Decoder layers that do not fit on the GPU stay in host memory. accelerate copies each of them to the GPU when a
    forward pass of the reference kernels needs it.
    """
    unquantized = quantization.model_copy(update={"bits": 16})
    fits = not torch.cuda.is_available() or _weights_gib(folder, compute) < _free_gpu_gib()
    model = load_base(folder, unquantized, compute, None if fits else _placement(folder, compute))
    return build_forward(model, kernels if fits else "reference")


def _placement(folder: Path, compute: Compute) -> Placement:
    """Puts as many decoder layers on the GPU as fit, and all other modules. The other layers are in host memory."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(read_config(folder))
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers_name, layers = max(lists, key=lambda entry: len(entry[1]))
    num_on_gpu = int(len(layers) * _free_gpu_gib() / _weights_gib(folder, compute))
    placement: Placement = {
        f"{layers_name}.{number}": device() if number < num_on_gpu else "cpu" for number in range(len(layers))
    }

    def place_others(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if layers_name.startswith(f"{name}."):
                place_others(child, f"{name}.")
            elif name != layers_name:
                placement[name] = device()

    place_others(model, "")
    return placement


def _weights_gib(folder: Path, compute: Compute) -> float:
    """The size of the weights in compute.compute_dtype. The files have 16 bits per weight."""
    num_weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
    return num_weights * compute_dtype(compute).itemsize / 2**30


def _free_gpu_gib() -> float:
    return UNQUANTIZED_GPU_SHARE * torch.cuda.mem_get_info()[0] / 2**30
