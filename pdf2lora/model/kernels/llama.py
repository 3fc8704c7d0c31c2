"""The forward pass of a PeftModel's Llama by the kernels of this folder, differentiable in the LoRA matrices."""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.dropout import dropout_state
from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.decoder import DecoderLayer, FinalNorm
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.rotary import Angles


class FusedLlama:
    """input_ids (batch, seq_length) -> hidden states (batch, seq_length, hidden), as transformers' LlamaModel.

    The PeftModel owns weights, LoRA matrices and gradients; its train() and disable_adapter() also work here.
    Attention is causal over the whole row; there is no padding on the left.
    A CUDA graph can capture forward and backward pass, except with GradientCheckpointing.OFFLOAD.
    """

    def __init__(
        self,
        model: Any,
        *,
        gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.NONE,
        fp8: bool = False,
    ):
        """model: a PeftModel of a LlamaForCausalLM with 4-bit layers. fp8: frozen products in training only."""
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        self.fp8 = fp8
        self.llama = model.get_base_model().model
        self.head = model.get_base_model().get_output_embeddings().weight
        self.dropout_state = dropout_state(model)
        dtype = self.llama.embed_tokens.weight.dtype
        self.layers = [DecoderLayer(number, layer, dtype) for number, layer in enumerate(self.llama.layers)]
        self.offload = Offload()
        self.cached_angles: tuple[int, Angles] | None = None
        if fp8:
            for layer in self.layers:
                for projections in layer.projections:
                    projections.frozen.to_fp8()

    def set_dropout(self, seed: int, first_row: int) -> None:
        """See DropoutState.set."""
        if self.dropout_state is not None:
            self.dropout_state.set(seed, first_row)

    def __call__(self, input_ids: Tensor) -> Tensor:
        batch, seq_length = input_ids.shape
        context = self._context(seq_length, input_ids.device)
        residual: Tensor = self.llama.embed_tokens(input_ids).view(batch * seq_length, -1)
        update = None
        for layer in self.layers:
            residual, update = layer(residual, update, context)
        hidden: Tensor = FinalNorm.apply(residual, update, self.llama.norm)
        return hidden.view(batch, seq_length, -1)

    def _context(self, seq_length: int, device: torch.device) -> ForwardContext:
        training = self.model.training
        state = self.dropout_state if training else None
        if state is not None:
            state.require_set()
        return ForwardContext(
            gradient_checkpointing=self.gradient_checkpointing,
            heads=self._heads(seq_length),
            angles=self._angles(seq_length, device),
            dropout_state=None if state is None else state.tensor,
            fp8=self.fp8 and training,
            offload=self.offload,
        )

    def _heads(self, seq_length: int) -> Heads:
        config = self.llama.config
        return Heads(
            config.num_attention_heads, config.num_key_value_heads, self.llama.layers[0].self_attn.head_dim, seq_length
        )

    def _angles(self, seq_length: int, device: torch.device) -> Angles:
        """Computed once for a sequence length: a captured CUDA graph reads them from the same memory."""
        if self.cached_angles is None or self.cached_angles[0] != seq_length:
            positions = torch.arange(seq_length, device=device)[None]
            cos, sin = self.llama.rotary_emb(torch.ones((), device=device), positions)
            half = cos.shape[-1] // 2
            angles = Angles(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
            self.cached_angles = seq_length, angles
        return self.cached_angles[1]
