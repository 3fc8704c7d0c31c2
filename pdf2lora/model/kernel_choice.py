"""Chooses the implementation of the training step: reference, fused or fp8."""

import importlib.util
import logging
from typing import Literal

import torch
from transformers import PreTrainedConfig

from pdf2lora.errors import InputError
from pdf2lora.model.architectures import fp8_obstacle, fused_obstacle
from pdf2lora.model.device import NO_CUDA_GPU, compute_dtype
from pdf2lora.params import ALL_LINEAR, Compute, Lora, Quantization

log = logging.getLogger(__name__)

Kernels = Literal["reference", "fused", "fp8"]

FUSED_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def choose_kernels(compute: Compute, quantization: Quantization, lora: Lora, config: PreTrainedConfig) -> Kernels:
    """Returns the kernels to use. `auto`: fused if they can run, else reference. Logs the choice and the reason.

    config: of the base model, by loading.read_config.

    Raises InputError if compute.kernels is fused or fp8 and they cannot run.
    """
    preferred = "fused" if compute.kernels == "auto" else compute.kernels
    obstacle = "" if preferred == "reference" else _obstacle(preferred, compute, quantization, lora, config)
    if obstacle and compute.kernels != "auto":
        fused_can_run = preferred == "fp8" and not _obstacle("fused", compute, quantization, lora, config)
        raise InputError(
            f"compute.kernels is {compute.kernels!r}; these kernels cannot run here: {obstacle}. Use 'auto' or "
            f"'reference'{' or ' + repr('fused') if fused_can_run else ''}."
        )
    choice: Kernels = "reference" if obstacle else preferred
    reason = f" ({obstacle})" if obstacle else ""
    log.info("kernels: %s (compute.kernels: %s)%s", choice, compute.kernels, reason)
    return choice


def choose_exact_kernels(compute: Compute, quantization: Quantization, lora: Lora, config: PreTrainedConfig) -> Kernels:
    """choose_kernels for evaluation and generation: fused instead of fp8, which approximates the products."""
    kernels = choose_kernels(compute, quantization, lora, config)
    return "fused" if kernels == "fp8" else kernels


def reference_reason(compute: Compute, quantization: Quantization, lora: Lora, config: PreTrainedConfig) -> str:
    """Why `auto` selects the slower reference kernels on this GPU. Empty if it does not, or without a GPU."""
    if compute.kernels != "auto" or not torch.cuda.is_available():
        return ""
    return _obstacle("fused", compute, quantization, lora, config)


def _obstacle(kernels: str, compute: Compute, quantization: Quantization, lora: Lora, config: PreTrainedConfig) -> str:
    """The reason why these kernels cannot run, or an empty string."""
    return (
        _machine_obstacle(kernels)
        or _settings_obstacle(compute, quantization, lora)
        or fused_obstacle(config, compute.seq_length)
        or (fp8_obstacle(config) if kernels == "fp8" else "")
    )


def _machine_obstacle(kernels: str) -> str:
    if not torch.cuda.is_available():
        return NO_CUDA_GPU
    capability = torch.cuda.get_device_capability()
    required = (8, 9) if kernels == "fp8" else (8, 0)
    if capability < required:
        return f"they need compute capability {required[0]}.{required[1]}, the GPU has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return ""


def _settings_obstacle(compute: Compute, quantization: Quantization, lora: Lora) -> str:
    if compute_dtype(compute) != torch.bfloat16:
        return "they compute in bfloat16 only (compute.compute_dtype)"
    if quantization.bits != 4:
        return f"they need a 4-bit base model, quantization.bits is {quantization.bits}"
    if lora.use_dora:
        return "they do not support DoRA (lora.use_dora)"
    if lora.target_modules != ALL_LINEAR and (others := set(lora.target_modules) - FUSED_TARGETS):
        return f"they do not support LoRA on {min(others)} (lora.target_modules)"
    from pdf2lora.model.kernels.lora import MAX_LORA_RANK

    if lora.r > MAX_LORA_RANK:
        return f"they support ranks up to {MAX_LORA_RANK}, lora.r is {lora.r}"
    return ""
