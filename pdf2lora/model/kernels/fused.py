"""The forward pass of a model by the kernels of this folder, differentiable in the LoRA matrices of a PeftModel."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn

from pdf2lora.errors import InputError
from pdf2lora.model.architectures import FUSED_RULES
from pdf2lora.model.dropout import dropout_state, lora_layers
from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.head import Head, causal_lm_of
from pdf2lora.model.kernels.attention import Heads
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.decoder import DecoderLayer, FinalNorm
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.rotary import Angles
from pdf2lora.model.layer_stream import layer_stream


class FusedForward:
    """input_ids (batch, seq_length) -> hidden states (batch, seq_length, hidden), as transformers' decoder.

    The model owns weights, LoRA matrices and gradients; its train() and disable_adapter() also work here.
    Attention is causal over the whole sequence. Sequences have no padding on the left.
    A CUDA graph can capture forward and backward pass, except with GradientCheckpointing.OFFLOAD.
    """

    def __init__(
        self,
        model: Any,
        *,
        gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.NONE,
        fp8: bool = False,
    ):
        """model: one that fused_obstacle() accepts: a PeftModel with 4-bit layers, or a transformers model without
        quantization. fp8: frozen products in training only.

        Raises:
            InputError: the kernels do not support a module of the model.
        """
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        self.fp8 = fp8
        causal_lm = causal_lm_of(model)
        self.decoder = causal_lm.model
        self.head = Head.of(causal_lm)
        self.dropout_state = dropout_state(model)
        _check_modules(model, self.decoder)
        dtype = self.decoder.embed_tokens.weight.dtype
        self.stream = layer_stream(model)
        self.layers = [
            DecoderLayer(number, layer, dtype, self.stream) for number, layer in enumerate(self.decoder.layers)
        ]
        self.offload = Offload()
        self.cached_angles: tuple[int, Angles] | None = None
        if fp8:
            for layer in self.layers:
                layer.load()
                for projections in layer.projections:
                    projections.frozen.compute_fp8_scales()

    def set_dropout(self, seed: int, first_sequence: int) -> None:
        """See DropoutState.set."""
        if self.dropout_state is not None:
            self.dropout_state.set(seed, first_sequence)

    def __call__(self, input_ids: Tensor) -> Tensor:
        batch, seq_length = input_ids.shape
        context = self._context(seq_length, input_ids.device)
        residual: Tensor = self.decoder.embed_tokens(input_ids).view(batch * seq_length, -1)
        update = None
        if self.stream is not None:
            self.stream.restart()
        for layer in self.layers:
            residual, update = layer(residual, update, context)
        hidden: Tensor = FinalNorm.apply(residual, update, self.decoder.norm)
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
        config = self.decoder.config
        head_dim = self.decoder.layers[0].self_attn.head_dim
        return Heads(config.num_attention_heads, config.num_key_value_heads, head_dim, seq_length)

    def _angles(self, seq_length: int, device: torch.device) -> Angles:
        """Computed once for a sequence length: a captured CUDA graph reads them from the same memory."""
        if self.cached_angles is None or self.cached_angles[0] != seq_length:
            positions = torch.arange(seq_length, device=device)[None]
            cos, sin = self.decoder.rotary_emb(torch.ones((), device=device), positions)
            half = cos.shape[-1] // 2
            angles = Angles(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
            self.cached_angles = seq_length, angles
        return self.cached_angles[1]


PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
OTHER_MODULES = frozenset(
    {"self_attn", "mlp", "act_fn", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm"}
)


def _check_modules(model: Any, decoder: Any) -> None:
    """A second check after fused_obstacle(): of the modules that transformers and PEFT have built."""
    remedy = "Use compute.kernels: reference."
    package = type(decoder).__module__
    if package.split(".")[:2] != ["transformers", "models"] or package.split(".")[2] not in FUSED_RULES:
        raise InputError(f"the fused kernels do not support {type(decoder).__name__} of {package}. {remedy}")
    projections = []
    for layer in decoder.layers:
        for parent in (layer, layer.self_attn, layer.mlp):
            if unknown := [name for name, _ in parent.named_children() if name not in PROJECTIONS | OTHER_MODULES]:
                raise InputError(f"the fused kernels do not support the module {unknown[0]} of a layer. {remedy}")
        block = layer.self_attn
        if abs(block.scaling * block.head_dim**0.5 - 1) > 1e-6:
            raise InputError(
                f"the fused kernels scale attention by 1 / sqrt(head_dim), not by {block.scaling}. {remedy}"
            )
        projections += [module for name, module in block.named_children() if name in PROJECTIONS]
        projections += [module for name, module in layer.mlp.named_children() if name in PROJECTIONS]
    for module in projections:
        linear = getattr(module, "base_layer", module)
        is_4bit = isinstance(linear, bnb.nn.Linear4bit) and linear.weight.data.dtype == torch.uint8
        if not (is_4bit if isinstance(model, PeftModel) else type(linear) is nn.Linear):
            raise InputError(f"the fused kernels need 4-bit layers, the model has a {type(linear).__name__}. {remedy}")
    if others := [module for module in lora_layers(model) if module not in projections]:
        raise InputError(f"the fused kernels do not support LoRA on {type(others[0]).__name__}. {remedy}")
