"""Token ids -> hidden states: by transformers and PEFT, the reference, or by the kernels of pdf2lora/kernels.

Either is asked for by `compute.kernels`; the head and the loss come after it, in loss.py, and are the same for both.
"""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from pdf2lora.model.capabilities import Kernels


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

    def set_dropout(self, seed: int, first_row: int) -> None:
        torch.manual_seed(seed % 2**31 + first_row)  # STUB until dropout.py

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
    from pdf2lora.model.kernels.decoder import Keep
    from pdf2lora.model.kernels.llama import FusedLlama

    return FusedLlama(model, keep=Keep(gradient_checkpointing), fp8=kernels == "fp8")
