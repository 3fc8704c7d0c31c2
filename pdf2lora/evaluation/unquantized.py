"""A model without quantization, also where it does not fit on the GPU."""

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

from pdf2lora.model.attention_choice import choose_attention
from pdf2lora.model.device import compute_dtype, device
from pdf2lora.model.loading import load_base
from pdf2lora.params import Compute, Quantization

FREE_SHARE = 0.8  # of the free GPU memory that weights can use; the rest is for activations and logits


def load_unquantized(folder: Path, quantization: Quantization, compute: Compute) -> LlamaForCausalLM:
    """The model in compute.compute_dtype, frozen.

    Layers that do not fit on the GPU stay in host memory. accelerate copies each of them to the GPU when a forward
    pass needs it.
    """
    if not torch.cuda.is_available() or _weights_gib(folder, compute) < _free_gib():
        unquantized = Quantization(**(quantization.model_dump() | {"bits": 16}))
        return load_base(folder, unquantized, compute)
    model = LlamaForCausalLM.from_pretrained(
        folder,
        dtype=compute_dtype(compute),
        device_map=_device_map(folder, compute),
        attn_implementation=choose_attention(compute),
        local_files_only=True,
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _device_map(folder: Path, compute: Compute) -> dict[str, torch.device | str]:
    """The first layers on the GPU, the others in host memory. Embedding, norm and head are on the GPU."""
    num_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    on_gpu = int(num_layers * _free_gib() / _weights_gib(folder, compute))
    layers = {f"model.layers.{layer}": device() if layer < on_gpu else "cpu" for layer in range(num_layers)}
    return layers | {name: device() for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}


def _weights_gib(folder: Path, compute: Compute) -> float:
    """The weights in compute.compute_dtype; the files have 16 bits a weight."""
    num_weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
    return num_weights * compute_dtype(compute).itemsize / 2**30


def _free_gib() -> float:
    return FREE_SHARE * torch.cuda.mem_get_info()[0] / 2**30
