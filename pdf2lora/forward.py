"""Token ids -> hidden states: by transformers and PEFT, the reference, or by the kernels of pdf2lora/kernels.

Either is asked for by `train.kernels`; the head and the loss come after it, in loss.py, and are the same for both.
"""

import importlib.util
import logging
from typing import Literal, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from pdf2lora.errors import InputError
from pdf2lora.model import compute_dtype
from pdf2lora.params import Lora, Quantization, Train

log = logging.getLogger(__name__)

Kernels = Literal["reference", "fused", "fp8"]

# What a layer keeps between the passes: the more there is to recompute, the less memory and the more time a step takes.
CHECKPOINTING: dict[Kernels, tuple[str, ...]] = {
    "reference": ("none", "full"),
    "fused": ("none", "mlp", "full", "offload"),
    "fp8": ("none", "mlp", "full", "offload"),
}


class Forward(Protocol):
    """input_ids (batch, seq_length) -> hidden states after the last norm, (batch, seq_length, hidden).

    The model's own train(), eval() and disable_adapter() hold for it; head: (vocabulary, hidden), of the model.
    """

    model: PeftModel | LlamaForCausalLM
    head: Tensor

    def __call__(self, input_ids: Tensor) -> Tensor: ...


class Reference:
    """transformers' layers, with PEFT's LoRA if there is one, under autocast where the base is in bfloat16."""

    def __init__(self, model: PeftModel | LlamaForCausalLM, gradient_checkpointing: str):
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model = model
        self.llama = causal_lm.model
        self.head = causal_lm.get_output_embeddings().weight
        if gradient_checkpointing == "full":
            self.llama.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.llama.gradient_checkpointing_disable()

    def __call__(self, input_ids: Tensor) -> Tensor:
        weight = self.llama.embed_tokens.weight
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            hidden: Tensor = self.llama(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden


def build_forward(
    model: PeftModel | LlamaForCausalLM, kernels: Kernels, gradient_checkpointing: str = "none"
) -> Forward:
    """The forward pass of a model; a later one for the same model takes the place of an earlier one.

    gradient_checkpointing: one of CHECKPOINTING[kernels].
    """
    if kernels == "reference":
        return Reference(model, gradient_checkpointing)
    from pdf2lora.kernels.decoder import Keep
    from pdf2lora.kernels.llama import FusedLlama

    return FusedLlama(model, keep=Keep(gradient_checkpointing), fp8=kernels == "fp8")


def choose_kernels(train: Train, quantization: Quantization, lora: Lora) -> Kernels:
    """The kernels that train.kernels means on this machine; `auto`: fused where they can run. Says which and why.

    Raises:
        InputError: fused or fp8 was asked for and cannot run.
    """
    wanted = "fused" if train.kernels == "auto" else train.kernels
    obstacle = "" if wanted == "reference" else _obstacle(wanted, train, quantization, lora)
    if obstacle and train.kernels != "auto":
        raise InputError(
            f"train.kernels: {train.kernels!r} cannot run here: {obstacle}; choose 'auto' or 'reference'"
            + (" or 'fused'" if wanted == "fp8" and not _obstacle("fused", train, quantization, lora) else "")
        )
    runs: Kernels = "reference" if obstacle else wanted
    log.info("kernels: %s asked for, %s runs%s", train.kernels, runs, f" ({obstacle})" if obstacle else "")
    return runs


def _obstacle(wanted: str, train: Train, quantization: Quantization, lora: Lora) -> str:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    needed = (8, 9) if wanted == "fp8" else (8, 0)
    if capability < needed:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, {needed[0]}.{needed[1]} is needed"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if compute_dtype(train) != torch.bfloat16:
        return "they compute in bfloat16 only (train.compute_dtype)"
    if quantization.bits != 4:
        return f"they need a base of 4 bits, quantization.bits is {quantization.bits}"
    if lora.use_dora:
        return "they do not compute DoRA (lora.use_dora)"
    from pdf2lora.kernels.lora import LARGEST_RANK

    if lora.r > LARGEST_RANK:
        return f"they hold ranks up to {LARGEST_RANK}, lora.r is {lora.r}"
    return ""


def checkpointing_modes(train: Train, kernels: Kernels) -> tuple[str, ...]:
    """The values of gradient_checkpointing to choose among, from the fastest step to the smallest.

    `auto` leaves the choice to find_batch on a GPU; on a CPU it is full, so that every CPU makes the same one.

    Raises:
        InputError: the kernels do not know the one that was asked for.
    """
    known = CHECKPOINTING[kernels]
    if train.gradient_checkpointing == "auto":
        return known if torch.cuda.is_available() else ("full",)
    if train.gradient_checkpointing not in known:
        raise InputError(
            f"train.gradient_checkpointing: {train.gradient_checkpointing!r} is not possible with the {kernels} "
            f"kernels; choose {', '.join(known)} or auto"
        )
    return (train.gradient_checkpointing,)
