"""A PeftModel's Llama, run by the kernels of this folder: token ids -> hidden states, differentiable in the adapter."""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.decoder import DecoderLayer, FinalNorm, Keep, Pass
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.rotary import Angles


class FusedLlama:
    """input_ids (batch, seq_length) -> hidden states (batch, seq_length, hidden), as the Llama's own `model` gives.

    Weights, matrices and their gradients stay the PeftModel's; `train()` and `disable_adapter()` on it count here.
    Sequences are not padded on the left, and attention is causal over the whole row.
    """

    def __init__(self, model: Any, *, keep: Keep = Keep.ALL, fp8: bool = False):
        """model: a PeftModel of a LlamaForCausalLM on 4-bit layers; fp8: of the frozen products, while training."""
        self.model = model
        self.keep = keep
        self.fp8 = fp8
        self.llama = model.get_base_model().model
        self.head = model.get_base_model().get_output_embeddings().weight
        dtype = self.llama.embed_tokens.weight.dtype
        self.layers = [DecoderLayer(number, layer, dtype) for number, layer in enumerate(self.llama.layers)]
        self.offload = Offload()
        if fp8:
            for layer in self.layers:
                for projections in layer.projections:
                    projections.frozen.to_fp8()

    def __call__(self, input_ids: Tensor) -> Tensor:
        batch, seq_length = input_ids.shape
        training = self.model.training
        shared = Pass(
            keep=self.keep,
            heads=self._heads(seq_length),
            angles=self._angles(seq_length, input_ids.device),
            # PyTorch's generator: checkpoints hold its state, so a resumed run draws the same masks
            seed=int(torch.randint(2**30, ())) if training else None,
            fp8=self.fp8 and training,
            offload=self.offload,
        )
        residual: Tensor = self.llama.embed_tokens(input_ids).view(batch * seq_length, -1)
        update = None
        for layer in self.layers:
            residual, update = layer(residual, update, shared)
        hidden: Tensor = FinalNorm.apply(residual, update, self.llama.norm)
        return hidden.view(batch, seq_length, -1)

    def _heads(self, seq_length: int) -> Heads:
        config = self.llama.config
        return Heads(
            config.num_attention_heads, config.num_key_value_heads, self.llama.layers[0].self_attn.head_dim, seq_length
        )

    def _angles(self, seq_length: int, device: torch.device) -> Angles:
        positions = torch.arange(seq_length, device=device)[None]
        cos, sin = self.llama.rotary_emb(torch.ones((), device=device), positions)
        half = cos.shape[-1] // 2
        return Angles(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
