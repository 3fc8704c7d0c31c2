"""Loads a 4-bit base model whose decoder layers are in GPU memory or in host memory (quantization.placement).

All other parts (embeddings, norms, biases, head) are on the GPU in both cases.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import bitsandbytes as bnb
import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from pdf2lora.errors import InputError
from pdf2lora.model.architectures import FUSED_RULES
from pdf2lora.model.base_weights import BaseWeights
from pdf2lora.model.device import NO_CUDA_GPU, device
from pdf2lora.model.layer_stream import LayerStream
from pdf2lora.model.packed_layers import LayerLayout, packed_file
from pdf2lora.params import Lora, Placement, Quantization
from pdf2lora.runtime.distributed import Processes
from pdf2lora.runtime.pinned_memory import shared_pinned_memory

GIB = 2**30
ACTIVATIONS_GIB = 2.0  # free memory that evaluate and generate need


def packing_obstacle(config: PreTrainedConfig, quantization: Quantization) -> str:
    """The reason why the layers of this model cannot be packed, or an empty string."""
    if quantization.bits != 4:
        return f"packed layers have 4 bits, quantization.bits is {quantization.bits}"
    if config.model_type not in FUSED_RULES:
        return f"{config.model_type} is not one of {', '.join(FUSED_RULES)}"
    if getattr(config, "quantization_config", None) is not None:
        return "the source model is quantized already"
    return ""


def choose_placement(base: Path, config: PreTrainedConfig, quantization: Quantization, dtype: torch.dtype) -> Placement:
    """Returns quantization.placement. auto: gpu if the model fits into the free memory of the GPU, else host.

    Raises InputError if the placement is host, which this machine or model does not support.
    """
    has_gpu = torch.cuda.is_available()
    obstacle = packing_obstacle(config, quantization) if has_gpu else NO_CUDA_GPU
    if quantization.placement == "host" and obstacle:
        raise InputError(f"quantization.placement is 'host', which cannot run here: {obstacle}. Use 'auto' or 'gpu'.")
    if quantization.placement != "auto":
        return quantization.placement
    if obstacle:
        return "gpu"
    free_gib = torch.cuda.mem_get_info()[0] / GIB
    return "gpu" if resident_gib(base, quantization, dtype) + ACTIVATIONS_GIB <= free_gib else "host"


def possible_placements(
    base: Path, config: PreTrainedConfig, quantization: Quantization, lora: Lora, dtype: torch.dtype
) -> tuple[Placement, ...]:
    """The placements that find_batch compares, gpu first.

    Raises InputError if the placement is host, which this machine or model does not support.
    """
    if quantization.placement == "auto" and lora.needs_resident_base:
        return ("gpu",)
    if quantization.placement == "auto" and torch.cuda.is_available() and not packing_obstacle(config, quantization):
        return ("gpu", "host")
    return (choose_placement(base, config, quantization, dtype),)


def resident_gib(base: Path, quantization: Quantization, dtype: torch.dtype) -> float:
    """GPU memory of the whole model with packed layers, in GiB. Reads only the headers of the files."""
    num_bytes = 0.0
    weights = BaseWeights(base)
    for name in weights.files:
        shape = weights.shape(name)
        is_packed = ".layers." in name and len(shape) == 2
        num_bytes += prod(shape) * (quantization.bits_per_weight / 8 if is_packed else dtype.itemsize)
    return num_bytes / GIB


def load_packed_base(
    base: Path,
    config: PreTrainedConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    attention: str,
    placement: Placement,
    processes: Processes,
) -> PreTrainedModel:
    """The frozen base model, its linear layers in 4 bits. packing_obstacle() must be empty.

    attention: transformers' attn_implementation. processes: with `host`, the processes of a node share the memory.

    Raises InputError if the host's memory or the disk is too small.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        for layer in model.model.layers:
            replace_linears(layer, quantization, dtype)
    layers = model.model.layers
    layouts = [LayerLayout(layer, quantization) for layer in layers]
    weights = BaseWeights(base)

    def read_layer(number: int) -> list[Tensor]:
        return [weights.read(f"model.layers.{number}.{name}.weight", dtype) for name in layouts[number].names]

    stream = packed_file(base, quantization, dtype, layouts, read_layer)
    _load_others(model, weights, dtype, base)
    if placement == "gpu":
        for layer, layout, buffer in zip(layers, layouts, _read_buffers(stream, layouts), strict=True):
            layout.attach(layer, layout.views(buffer.to(device())), dtype)
    else:
        purpose = f"quantization.placement host: the packed layers of {base}"
        num_bytes = sum(layout.num_bytes for layout in layouts)
        memory = shared_pinned_memory(num_bytes, lambda to: _read_file(stream, to), processes, purpose)
        host = memory.split([layout.num_bytes for layout in layouts])
        model.layer_stream = LayerStream(layers, layouts, host, device(), dtype)
        model.layer_stream.memory = memory  # the split parts do not keep it pinned
    model.is_loaded_in_4bit = True  # PEFT then adds LoRA to Linear4bit
    return model.eval()


def replace_linears(layer: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replaces each linear layer of a decoder layer by a Linear4bit without weights."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=quantization.bnb_4bit_use_double_quant,
                quant_type=quantization.bnb_4bit_quant_type,
            )
            layer.set_submodule(name, linear)


def _load_others(model: PreTrainedModel, weights: BaseWeights, dtype: torch.dtype, base: Path) -> None:
    """Reads all parameters that are not packed, and moves the buffers (RoPE frequencies) to the device.

    Raises InputError if a weight is missing.
    """
    for name, parameter in list(model.named_parameters()):
        if not isinstance(parameter, bnb.nn.Params4bit) and name in weights.files:
            module = model.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], nn.Parameter(weights.read(name, dtype), requires_grad=False))
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device()))
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta and "layers." not in name]
    if missing:
        raise InputError(f"{base} has no weight {missing[0]}. Make it again with: dvc repro --force convert")
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)


def _read_buffers(stream: BinaryIO, layouts: Sequence[LayerLayout]) -> list[Tensor]:
    """Maps the file into memory. A layer is read from disk when it is copied."""
    values = torch.from_numpy(np.memmap(stream, dtype=np.uint8, mode="c"))
    return list(values.split([layout.num_bytes for layout in layouts]))


def _read_file(stream: BinaryIO, to: Tensor) -> None:
    view: Any = memoryview(to.numpy())  # type: ignore[arg-type]
    while len(view):
        view = view[stream.readinto(view) :]  # type: ignore[attr-defined]
