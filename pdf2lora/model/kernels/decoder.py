"""A Llama decoder layer as one autograd function, written out forward and backward.

Autograd would add up gradients of what several projections read, keep what is cheap to make again, and recompute under
checkpointing what nothing needs. Written out, residual adds happen inside RMSNorm, gradients of a layer's input are
one product, gradients overwrite what they no longer need, and `Keep` says what stays in memory between the passes:

    Keep      bytes a token and layer (3B)       recomputed in the backward pass
    ALL       68 K                               nothing
    NO_MLP    36 K                               RMSNorm, gate and up projections
    INPUT      6 K                               all but the down projection
    OFFLOAD    0 (6 K in the host's memory)      the same

A layer takes and gives its residual stream as two summands, so that the sum is made by the next RMSNorm.
"""

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdf2lora.model.kernels import attention
from pdf2lora.model.kernels.elementwise import add_rmsnorm, rmsnorm_backward_, swiglu, swiglu_backward_
from pdf2lora.model.kernels.lora import LowRank
from pdf2lora.model.kernels.offload import Offload
from pdf2lora.model.kernels.projections import Projections
from pdf2lora.model.kernels.rotary import Angles, rotary_backward, rotate_
from pdf2lora.model.kernels.rows import Rows, quantize


class Keep(Enum):
    ALL = "none"  # the values are what params.yaml calls gradient checkpointing
    NO_MLP = "mlp"
    INPUT = "full"
    OFFLOAD = "offload"


class Pass(NamedTuple):
    """What all layers share in one forward pass and its backward pass."""

    keep: Keep
    heads: attention.Heads
    angles: Angles
    seed: int | None  # of dropout; None: evaluation
    fp8: bool
    offload: Offload


class Activations:
    """What backward needs of one layer; a name is absent until its value is made, and once it is forgotten."""

    total: Tensor  # residual + update, (tokens, hidden)
    rstd: Tensor
    x: Tensor | None  # what the LoRA of q, k, v reads
    qkv: Tensor  # rotated, (tokens, heads.width)
    qkv_low_rank: LowRank | None
    attended: attention.Attended
    o_low_rank: LowRank | None
    total_mlp: Tensor  # the residual stream after attention
    rstd_mlp: Tensor
    x_mlp: Tensor | None  # what the LoRA of gate and up reads
    gate_up: Tensor  # (tokens, 2 * intermediate)
    gate_up_low_rank: LowRank | None
    down_low_rank: LowRank | None

    def forget(self, *names: str) -> None:
        for name in names:
            delattr(self, name)


class DecoderLayer:
    """One layer of a PeftModel's Llama; refers to its weights and matrices, and owns none."""

    def __init__(self, number: int, layer: Any, dtype: torch.dtype):
        block, mlp = layer.self_attn, layer.mlp
        self.number = number
        self.norm, self.norm_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Projections([block.q_proj, block.k_proj, block.v_proj], dtype)
        self.o = Projections([block.o_proj], dtype)
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Projections([mlp.down_proj], dtype)
        self.projections = [self.qkv, self.o, self.gate_up, self.down]

    def __call__(self, residual: Tensor, update: Tensor | None, shared: Pass) -> tuple[Tensor, Tensor]:
        """(tokens, hidden), twice -> the same."""
        parameters = [parameter for projections in self.projections for parameter in projections.parameters]
        result: tuple[Tensor, Tensor] = _Layer.apply(residual, update, self, shared, *parameters)
        return result

    def seed(self, projections: Projections, shared: Pass) -> int | None:
        """Another one for each of at most three projections of four groups."""
        part = self.projections.index(projections)
        return None if shared.seed is None else shared.seed + 12 * self.number + 3 * part

    def attend(self, residual: Tensor, update: Tensor | None, shared: Pass, made: Activations) -> Tensor:
        """RMSNorm to o; gives what o adds to made.total."""
        made.total, x, made.rstd = _normed_for(self.qkv, self.norm, residual, update, shared)
        made.x = x.values if self.qkv.has_lora else None
        made.qkv, made.qkv_low_rank = self.qkv.forward(x, self.seed(self.qkv, shared))
        rotate_(made.qkv, shared.angles, shared.heads)
        made.attended = attention.forward(made.qkv, shared.heads)
        attended = shared.heads.rows(made.attended.output)
        rows = quantize(attended) if shared.fp8 else Rows(attended)
        result, made.o_low_rank = self.o.forward(rows, self.seed(self.o, shared))
        return result

    def gate(self, residual: Tensor, update: Tensor | None, shared: Pass, made: Activations) -> None:
        """RMSNorm to gate and up."""
        made.total_mlp, x, made.rstd_mlp = _normed_for(self.gate_up, self.norm_mlp, residual, update, shared)
        made.x_mlp = x.values if self.gate_up.has_lora else None
        made.gate_up, made.gate_up_low_rank = self.gate_up.forward(x, self.seed(self.gate_up, shared))

    def activate(self, shared: Pass, made: Activations) -> Rows:
        """SwiGLU: what down reads."""
        return swiglu(made.gate_up, values=self.down.needs_values(shared.fp8), fp8=shared.fp8)

    def forget_attention(self, shared: Pass, made: Activations) -> None:
        """After attention in the forward pass: what `recompute` can make again."""
        if shared.keep in (Keep.INPUT, Keep.OFFLOAD):
            made.forget("x", "rstd", "qkv", "qkv_low_rank", "attended", "o_low_rank")

    def forget_mlp(self, shared: Pass, made: Activations) -> None:
        """The same, after the MLP."""
        if shared.keep is not Keep.ALL:
            made.forget("x_mlp", "gate_up", "gate_up_low_rank")
        if shared.keep in (Keep.INPUT, Keep.OFFLOAD):
            made.forget("total_mlp", "rstd_mlp", "down_low_rank")
        if shared.keep is Keep.OFFLOAD:
            shared.offload.put(self.number, made.total)
            made.forget("total")

    def recompute(self, shared: Pass, made: Activations) -> None:
        """Makes, before the backward pass, what was forgotten, with the same dropout."""
        if shared.keep is Keep.ALL:
            return
        if shared.keep is Keep.NO_MLP:
            self.gate(made.total_mlp, None, shared, made)
            return
        if shared.keep is Keep.OFFLOAD:
            made.total = shared.offload.take(self.number)
        update = self.attend(made.total, None, shared, made)
        self.gate(made.total, update, shared, made)


def _normed_for(
    reader: Projections, norm: Any, residual: Tensor, update: Tensor | None, shared: Pass
) -> tuple[Tensor, Rows, Tensor]:
    """add_rmsnorm, its rows as the projections that read them want them."""
    values = reader.needs_values(shared.fp8)
    return add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon, values=values, fp8=shared.fp8)


class _Layer(torch.autograd.Function):
    """(residual, update) -> (residual, update), whose sums are the layer's input and output."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor | None, layer: DecoderLayer, shared: Pass, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        made = Activations()
        for projections in layer.projections:
            projections.refresh()
        attended = layer.attend(residual, update, shared, made)
        training = any(ctx.needs_input_grad)
        if training:
            layer.forget_attention(shared, made)
        layer.gate(made.total, attended, shared, made)
        del attended
        down, made.down_low_rank = layer.down.forward(layer.activate(shared, made), layer.seed(layer.down, shared))
        total_mlp = made.total_mlp
        if training:
            # without its history, which leads to ctx: a reference cycle would hold the memory
            made.total, made.total_mlp = made.total.detach(), total_mlp.detach()
            layer.forget_mlp(shared, made)
            ctx.layer, ctx.shared, ctx.made = layer, shared, made
        return total_mlp, down

    @staticmethod
    def backward(ctx: Any, grad: Tensor, same: Tensor) -> tuple[Tensor | None, ...]:
        # Both summands have the gradient of their sum, which comes from the next layer twice.
        assert grad.data_ptr() == same.data_ptr()
        layer, shared, made = ctx.layer, ctx.shared, ctx.made
        del ctx.made
        layer.recompute(shared, made)
        fp8 = shared.fp8

        activated = layer.activate(shared, made).values if layer.down.has_lora else None
        if shared.keep in (Keep.INPUT, Keep.OFFLOAD):
            made.down_low_rank = layer.down.low_rank(activated, layer.seed(layer.down, shared))
        rows = quantize(grad) if fp8 else Rows(grad)
        d_activated, of_down = layer.down.backward(rows, activated, made.down_low_rank)
        del rows, activated
        d_gate_up = swiglu_backward_(d_activated, made.gate_up, values=layer.gate_up.needs_values(fp8), fp8=fp8)
        del d_activated
        made.forget("gate_up")
        d_x_mlp, of_gate_up = layer.gate_up.backward(d_gate_up, made.x_mlp, made.gate_up_low_rank)
        del d_gate_up
        d_total = rmsnorm_backward_(d_x_mlp, made.total_mlp, made.rstd_mlp, layer.norm_mlp.weight, grad, fp8=fp8)
        made.forget("x_mlp", "total_mlp")

        attended = shared.heads.rows(made.attended.output)
        d_attended, of_o = layer.o.backward(d_total, attended, made.o_low_rank)
        d_heads = attention.backward(d_attended, made.qkv, made.attended, shared.heads)
        del attended, d_attended
        made.forget("qkv", "attended")
        d_qkv, d_low_rank = rotary_backward(d_heads, shared.angles, shared.heads, layer.qkv.up)
        del d_heads
        input_needs_grad = ctx.needs_input_grad[0]
        d_x, of_qkv = layer.qkv.backward(
            quantize(d_qkv) if fp8 else Rows(d_qkv),
            made.x,
            made.qkv_low_rank,
            grad_x=input_needs_grad,
            grad_low_rank=d_low_rank,
        )
        d_input = None
        if input_needs_grad:
            d_input = rmsnorm_backward_(d_x, made.total, made.rstd, layer.norm.weight, d_total.values).values
        d_update = d_input if ctx.needs_input_grad[1] else None
        return d_input, d_update, None, None, *of_qkv, *of_o, *of_gate_up, *of_down


class FinalNorm(torch.autograd.Function):
    """RMSNorm of residual + update: (tokens, hidden), twice -> (tokens, hidden)."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, update: Tensor, norm: Any) -> Tensor:
        total, x, rstd = add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon)
        ctx.norm = norm
        ctx.save_for_backward(total, rstd)
        assert x.values is not None
        return x.values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd = ctx.saved_tensors
        d_total = rmsnorm_backward_(grad.clone(), total, rstd, ctx.norm.weight, None).values
        return d_total, d_total, None
