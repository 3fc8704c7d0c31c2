"""The forward pass: token ids -> hidden states after the last norm. compute.kernels selects the implementation.

`ReferenceForward` calls transformers and PEFT and supports any decoder-only causal language model. `FusedForward` calls
the kernels in pdf2lora/model/kernels and supports the models of architectures.py. loss.py computes the loss for both.
"""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from pdf2lora.errors import InputError
from pdf2lora.model.dropout import dropout_state
from pdf2lora.model.gradient_checkpointing import SUPPORTED_GRADIENT_CHECKPOINTING, GradientCheckpointing
from pdf2lora.model.head import Head, causal_lm_of, decoder_of
from pdf2lora.model.kernel_choice import Kernels


class Forward(Protocol):
    """input_ids (batch, seq_length) -> hidden states after the last norm, (batch, seq_length, hidden).

    The model's train(), eval() and disable_adapter() also change this forward pass.
    """

    model: PeftModel | PreTrainedModel
    head: Head

    def __call__(self, input_ids: Tensor) -> Tensor: ...

    def set_dropout(self, seed: int, first_sequence: int) -> None:
        """See DropoutState.set. Does nothing for a model without dropout."""
        ...


class ReferenceForward:
    """transformers' layers with PEFT's LoRA, under autocast if the base model is in half precision."""

    def __init__(self, model: PeftModel | PreTrainedModel, gradient_checkpointing: GradientCheckpointing):
        """Raises InputError if the model has no gradient checkpointing and `gradient_checkpointing` is FULL."""
        causal_lm = causal_lm_of(model)
        self.model = model
        self.decoder = decoder_of(causal_lm)
        self.embeddings = causal_lm.get_input_embeddings()
        self.head = Head.of(causal_lm)
        self.dropout_state = dropout_state(model)
        if gradient_checkpointing is GradientCheckpointing.FULL:
            if not causal_lm.supports_gradient_checkpointing:
                name = type(causal_lm).__name__
                raise InputError(f"train.gradient_checkpointing is 'full'; {name} does not support it. Use 'none'.")
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.decoder.gradient_checkpointing_disable()

    def __call__(self, input_ids: Tensor) -> Tensor:
        weight = self.embeddings.weight
        if self.dropout_state is not None:
            self.dropout_state.seq_length = input_ids.shape[1]
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            hidden: Tensor = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def set_dropout(self, seed: int, first_sequence: int) -> None:
        if self.dropout_state is not None:
            self.dropout_state.set(seed, first_sequence)


def build_forward(
    model: PeftModel | PreTrainedModel, kernels: Kernels, gradient_checkpointing: str = "none"
) -> Forward:
    """Builds the forward pass of a model. The last one that is built sets the model's gradient checkpointing.

    Raises:
        ValueError: gradient_checkpointing is not in SUPPORTED_GRADIENT_CHECKPOINTING[kernels].
        InputError: the kernels or the model do not support the settings.
    """
    checkpointing = GradientCheckpointing(gradient_checkpointing)
    if checkpointing not in SUPPORTED_GRADIENT_CHECKPOINTING[kernels]:
        raise ValueError(f"the {kernels} kernels do not support gradient_checkpointing {gradient_checkpointing!r}")
    if kernels == "reference":
        return ReferenceForward(model, checkpointing)
    from pdf2lora.model.kernels.fused import FusedForward

    return FusedForward(model, gradient_checkpointing=checkpointing, fp8=kernels == "fp8")
