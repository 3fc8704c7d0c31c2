"""Chooses transformers' attention implementation, for the reference kernels. The fused kernels have their own."""

import importlib.util
import logging

import torch

from pdf2lora.errors import InputError
from pdf2lora.model.device import compute_dtype
from pdf2lora.params import Compute

log = logging.getLogger(__name__)


def choose_attention(compute: Compute) -> str:
    """Returns flash_attention_2 if it is installed and usable, else sdpa. Logs the choice and the reason.

    Raises:
        InputError: compute.attention is flash_attention_2 and it cannot run.
    """
    obstacle = _flash_attention_obstacle(compute)
    if compute.attention == "flash_attention_2" and obstacle:
        raise InputError(
            f"compute.attention is 'flash_attention_2', which cannot run here: {obstacle}. Use 'auto' or 'sdpa', or "
            "see requirements-gpu.txt."
        )
    choice = "sdpa" if obstacle or compute.attention == "sdpa" else "flash_attention_2"
    reason = f" ({obstacle})" if obstacle and compute.attention == "auto" else ""
    log.info("attention: %s (compute.attention: %s)%s", choice, compute.attention, reason)
    return choice


def _flash_attention_obstacle(compute: Compute) -> str:
    """The reason why flash_attention_2 cannot run, or an empty string."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if compute_dtype(compute) == torch.float32:
        return "it computes in half precision only"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return ""
