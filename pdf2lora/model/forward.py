"""The forward pass: token ids -> hidden states after the last norm. compute.kernels selects the implementation.

`Reference` calls transformers and PEFT, `FusedLlama` the kernels in pdf2lora/model/kernels. The head and the loss are
in loss.py, the same for both.
"""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from pdf2lora.model.dropout import dropout_state
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING, GradientCheckpointing
from pdf2lora.model.kernel_choice import Kernels


class Forward(Protocol):
    """input_ids (batch, seq_length) -> hidden states after the last norm, (batch, seq_length, hidden).

    The model's train(), eval() and disable_adapter() also change this forward pass.
    head: the output embeddings, (vocabulary, hidden).
    """

    model: PeftModel | LlamaForCausalLM
    head: Tensor

    def __call__(self, input_ids: Tensor) -> Tensor: ...

    def set_dropout(self, seed: int, first_row: int) -> None:
        """See DropoutState.set. Does nothing for a model without dropout."""
        ...


class Reference:
    """Transformers' layers with PEFT's LoRA, under autocast if the base model is in half precision."""

    def __init__(self, model: PeftModel | LlamaForCausalLM, gradient_checkpointing: GradientCheckpointing):
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model = model
        self.llama = causal_lm.model
        self.head = causal_lm.get_output_embeddings().weight
        self.dropout_state = dropout_state(model)
        if gradient_checkpointing is GradientCheckpointing.FULL:
            self.llama.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.llama.gradient_checkpointing_disable()

    def __call__(self, input_ids: Tensor) -> Tensor:
        weight = self.llama.embed_tokens.weight
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            hidden: Tensor = self.llama(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def set_dropout(self, seed: int, first_row: int) -> None:
        if self.dropout_state is not None:
            self.dropout_state.set(seed, first_row)


def build_forward(
    model: PeftModel | LlamaForCausalLM, kernels: Kernels, gradient_checkpointing: str = "none"
) -> Forward:
    """The forward pass of a model. If a model has several, the last one built decides on gradient checkpointing.

    Raises:
        ValueError: gradient_checkpointing is not in SUPPORTED_GRADIENT_CHECKPOINTING[kernels].
    """
    checkpointing = GradientCheckpointing(gradient_checkpointing)
    if checkpointing not in SUPPORTED_GRADIENT_CHECKPOINTING[kernels]:
        raise ValueError(f"the {kernels} kernels do not support gradient_checkpointing {gradient_checkpointing!r}")
    if kernels == "reference":
        return Reference(model, checkpointing)
    from pdf2lora.model.kernels.llama import FusedLlama

    return FusedLlama(model, gradient_checkpointing=checkpointing, fp8=kernels == "fp8")
