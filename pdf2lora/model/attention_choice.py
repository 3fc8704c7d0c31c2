"""Chooses transformers' attention implementation for the reference kernels. The fused kernels have their own one."""

import importlib.util
import logging

import torch
from transformers import PreTrainedModel

from pdf2lora.errors import InputError
from pdf2lora.model.device import NO_CUDA_GPU, compute_dtype
from pdf2lora.params import Compute

log = logging.getLogger(__name__)


def choose_attention(compute: Compute, model_class: type[PreTrainedModel]) -> str:
    """Returns flash_attention_2 if it is installed and usable, else sdpa, else eager. Logs the choice and the reason.

    model_class: of transformers; Gemma 2, for example, supports neither of the first two.

    Raises InputError if the value of compute.attention cannot run here.
    """
    obstacles: dict[str, str] = {
        "flash_attention_2": _flash_attention_obstacle(compute, model_class),
        "sdpa": "" if model_class._supports_sdpa else f"{model_class.__name__} does not support it",
    }
    if obstacle := obstacles.get(compute.attention):
        remedies = ["'auto'", *(f"'{name}'" for name in obstacles if not obstacles[name])]
        if "not installed" in obstacle:
            remedies.append("see requirements-gpu.txt")
        raise InputError(
            f"compute.attention is {compute.attention!r}, which cannot run here: {obstacle}. "
            f"Use {', or '.join(remedies)}."
        )
    choice: str = compute.attention
    reason = ""
    if choice == "auto":
        choice = next((name for name in obstacles if not obstacles[name]), "eager")
        reason = "".join(f" ({name}: {obstacle})" for name, obstacle in obstacles.items() if obstacle)
    log.info("attention: %s (compute.attention: %s)%s", choice, compute.attention, reason)
    return choice


def _flash_attention_obstacle(compute: Compute, model_class: type[PreTrainedModel]) -> str:
    """The reason why flash_attention_2 cannot run, or an empty string."""
    if not torch.cuda.is_available():
        return NO_CUDA_GPU
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if compute_dtype(compute) == torch.float32:
        return "it computes in half precision only"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if not model_class._supports_flash_attn:
        return f"{model_class.__name__} does not support it"
    return ""
