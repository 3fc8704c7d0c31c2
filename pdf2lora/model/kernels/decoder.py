"""A decoder layer (pdf2lora/model/architectures.py) as one autograd function with a hand-written backward pass.

With autograd, gradients of one tensor from several projections need extra additions, activations that are cheap to
recompute stay in memory, and checkpointing recomputes too much. Here
- RMSNorm adds the residual, in both passes,
- one product gives the gradient of the input of several projections,
- gradients overwrite activations that are no longer needed,
- `GradientCheckpointing` selects the activations that stay in memory between the passes:

    value     bytes per token and layer (3B)   recomputed in the backward pass
    NONE      68 K                             nothing
    MLP       36 K                             RMSNorm, gate and up projections
    FULL       6 K                             all but the down projection
    OFFLOAD    0 (6 K in host memory)          the same

A layer reads and returns its residual stream as two summands, so that the next RMSNorm computes the sum.
"""

from typing import Any

import torch
from torch import Tensor

from pdf2lora.model.gradient_checkpointing import GradientCheckpointing
from pdf2lora.model.kernels import attention
from pdf2lora.model.kernels.context import ForwardContext
from pdf2lora.model.kernels.elementwise import add_rmsnorm, rmsnorm_backward_, swiglu, swiglu_backward_
from pdf2lora.model.kernels.lora import LowRank
from pdf2lora.model.kernels.projections import Projections
from pdf2lora.model.kernels.rotary import Angles, HeadNorm, normalize_and_rotate, rotary_backward, rotate_
from pdf2lora.model.kernels.rows import Rows, quantize
from pdf2lora.model.layer_stream import LayerStream


class Activations:
    """Activations of one layer for its backward pass. An attribute exists until drop() deletes it."""

    total: Tensor  # residual + update, (tokens, hidden)
    rstd: Tensor  # 1 / RMS of total, (tokens,), float32
    x: Tensor | None  # input of q, k and v; None without LoRA
    qkv: Tensor  # product of q, k and v, (tokens, heads.width); rotated in place without a head norm
    qkv_low_rank: LowRank | None
    attended: attention.Attended
    o_low_rank: LowRank | None
    total_mlp: Tensor  # the residual stream after attention
    rstd_mlp: Tensor
    x_mlp: Tensor | None  # input of gate and up; None without LoRA
    gate_up: Tensor  # (tokens, 2 * intermediate)
    gate_up_low_rank: LowRank | None
    down_low_rank: LowRank | None

    def drop(self, *names: str) -> None:
        for name in names:
            delattr(self, name)


class DecoderLayer:
    """One layer of a PeftModel's decoder. Refers to the PeftModel's weights and LoRA matrices."""

    def __init__(self, number: int, layer: Any, dtype: torch.dtype, stream: LayerStream | None = None):
        """stream: of the frozen weights, if they are in host memory."""
        block, mlp = layer.self_attn, layer.mlp
        self.number, self.stream = number, stream
        self.norm, self.norm_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Projections([block.q_proj, block.k_proj, block.v_proj], dtype)
        self.o = Projections([block.o_proj], dtype)
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Projections([mlp.down_proj], dtype)
        self.projections = [self.qkv, self.o, self.gate_up, self.down]
        self.uses_rotary = bool(getattr(block, "use_rope", True))
        self.head_norm: HeadNorm | None = None
        if hasattr(block, "q_norm"):
            weight = torch.stack([block.q_norm.weight, block.k_norm.weight]).detach()
            self.head_norm = HeadNorm(weight, block.q_norm.variance_epsilon)

    def __call__(self, residual: Tensor, update: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Two tensors (tokens, hidden), whose sum is the layer's input -> two whose sum is its output."""
        parameters = [parameter for projections in self.projections for parameter in projections.parameters]
        result: tuple[Tensor, Tensor] = _Layer.apply(residual, update, self, context, *parameters)
        return result

    def load(self, *, backward: bool = False) -> None:
        """Waits for the frozen weights if they come from host memory."""
        if self.stream is not None:
            self.stream.load(self.number, backward=backward)

    def attend(
        self, residual: Tensor, update: Tensor | None, context: ForwardContext, activations: Activations
    ) -> Tensor:
        """RMSNorm to o. Returns the summand that attention adds to activations.total."""
        total, x, rstd = _norm_for(self.qkv, self.norm, residual, update, context)
        activations.total, activations.rstd = total, rstd
        activations.x = x.values if self.qkv.has_lora else None
        activations.qkv, activations.qkv_low_rank = self.qkv.forward(x, context)
        if self.head_norm is None and self.uses_rotary:
            rotate_(activations.qkv, context.angles, context.heads)
        activations.attended = attention.forward(self.parts(context, activations), context.heads)
        attended = context.heads.rows(activations.attended.output)
        rows = quantize(attended) if context.fp8 else Rows(attended)
        result, activations.o_low_rank = self.o.forward(rows, context)
        return result

    def parts(self, context: ForwardContext, activations: Activations) -> attention.Parts:
        """Rotated queries and keys, and values. With a head norm, each call computes them again."""
        query, key, value = context.heads.split(activations.qkv)
        if self.head_norm is None:
            return query, key, value
        rows = normalize_and_rotate(activations.qkv, self.angles(context), context.heads, self.head_norm)
        query, key = context.heads.split_queries_and_keys(rows)
        return query, key, value

    def angles(self, context: ForwardContext) -> Angles | None:
        return context.angles if self.uses_rotary else None

    def gate(self, residual: Tensor, update: Tensor | None, context: ForwardContext, activations: Activations) -> None:
        """RMSNorm to gate and up."""
        total, x, rstd = _norm_for(self.gate_up, self.norm_mlp, residual, update, context)
        activations.total_mlp, activations.rstd_mlp = total, rstd
        activations.x_mlp = x.values if self.gate_up.has_lora else None
        activations.gate_up, activations.gate_up_low_rank = self.gate_up.forward(x, context)

    def activate(self, context: ForwardContext, activations: Activations) -> Rows:
        """SwiGLU: the input of down."""
        return swiglu(activations.gate_up, values=self.down.needs_values(context.fp8), fp8=context.fp8)

    def drop_attention(self, context: ForwardContext, activations: Activations) -> None:
        """Drops, after attention in the forward pass, the activations that `recompute` restores."""
        if context.recomputes_attention:
            activations.drop("x", "rstd", "qkv", "qkv_low_rank", "attended", "o_low_rank")

    def drop_mlp(self, context: ForwardContext, activations: Activations) -> None:
        """The same, after the MLP."""
        if context.recomputes_mlp:
            activations.drop("x_mlp", "gate_up", "gate_up_low_rank")
        if context.recomputes_attention:
            activations.drop("total_mlp", "rstd_mlp")
            if activations.down_low_rank is not None and activations.down_low_rank.mask is not None:
                activations.drop("down_low_rank")  # because its dropout mask needs memory
        if context.gradient_checkpointing is GradientCheckpointing.OFFLOAD:
            context.offload.put(self.number, activations.total)
            activations.drop("total")

    def recompute(self, context: ForwardContext, activations: Activations) -> None:
        """Restores the dropped activations before the backward pass, with the same dropout."""
        match context.gradient_checkpointing:
            case GradientCheckpointing.NONE:
                return
            case GradientCheckpointing.MLP:
                self.gate(activations.total_mlp, None, context, activations)
                return
            case GradientCheckpointing.OFFLOAD:
                activations.total = context.offload.take(self.number)
        update = self.attend(activations.total, None, context, activations)
        self.gate(activations.total, update, context, activations)


def _norm_for(
    reader: Projections, norm: Any, residual: Tensor, update: Tensor | None, context: ForwardContext
) -> tuple[Tensor, Rows, Tensor]:
    """add_rmsnorm, with its rows in the formats that `reader` needs."""
    values = reader.needs_values(context.fp8)
    return add_rmsnorm(residual, update, norm.weight, norm.variance_epsilon, values=values, fp8=context.fp8)


class _Layer(torch.autograd.Function):
    """(residual, update) -> (residual, update). The sums are the layer's input and output."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        update: Tensor | None,
        layer: DecoderLayer,
        context: ForwardContext,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        activations = Activations()
        layer.load()
        for projections in layer.projections:
            projections.refresh()
        attended = layer.attend(residual, update, context, activations)
        training = any(ctx.needs_input_grad)
        if training:
            layer.drop_attention(context, activations)
        layer.gate(activations.total, attended, context, activations)
        del attended
        down, activations.down_low_rank = layer.down.forward(layer.activate(context, activations), context)
        total_mlp = activations.total_mlp
        if training:
            # Without detach(), the tensors' autograd history refers to ctx. This reference cycle would keep the memory.
            activations.total, activations.total_mlp = activations.total.detach(), total_mlp.detach()
            layer.drop_mlp(context, activations)
            ctx.layer, ctx.context, ctx.activations = layer, context, activations
        return total_mlp, down

    @staticmethod
    def backward(ctx: Any, grad: Tensor, same_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Both summands have the gradient of their sum. The next layer returns it twice.
        assert grad.data_ptr() == same_grad.data_ptr()
        layer, context, activations = ctx.layer, ctx.context, ctx.activations
        del ctx.activations
        layer.load(backward=True)
        layer.recompute(context, activations)
        fp8 = context.fp8

        activated = None  # the input of down
        if not hasattr(activations, "down_low_rank"):
            activated = layer.activate(context, activations).values
            activations.down_low_rank = layer.down.low_rank(activated, context)
        rows, down_low_rank = quantize(grad) if fp8 else Rows(grad), activations.down_low_rank
        grad_low_rank = layer.down.grad_low_rank(rows, down_low_rank)
        d_activated = layer.down.input_gradient(rows, down_low_rank, grad_low_rank)
        d_gate_up = swiglu_backward_(
            d_activated,
            activations.gate_up,
            values=layer.gate_up.needs_values(fp8),
            fp8=fp8,
            result=layer.down.has_lora and activated is None,
        )
        if activated is None:
            activated = d_activated  # overwritten by the result
        d_down = layer.down.matrix_gradients(rows, activated, down_low_rank, grad_low_rank)
        del rows, d_activated, activated
        activations.drop("gate_up")
        d_x_mlp, d_gate_up_lora = layer.gate_up.backward(d_gate_up, activations.x_mlp, activations.gate_up_low_rank)
        del d_gate_up
        d_total = rmsnorm_backward_(
            d_x_mlp, activations.total_mlp, activations.rstd_mlp, layer.norm_mlp.weight, grad, fp8=fp8
        )
        activations.drop("x_mlp", "total_mlp")

        attended = context.heads.rows(activations.attended.output)
        d_attended, d_o = layer.o.backward(d_total, attended, activations.o_low_rank)
        parts = layer.parts(context, activations)
        d_heads = attention.backward(d_attended, parts, activations.attended, context.heads)
        del attended, d_attended, parts
        activations.drop("attended")
        d_qkv, d_low_rank = rotary_backward(
            d_heads, layer.angles(context), context.heads, layer.qkv.up, activations.qkv, layer.head_norm
        )
        activations.drop("qkv")
        del d_heads
        input_needs_grad = ctx.needs_input_grad[0]
        d_x, d_qkv_lora = layer.qkv.backward(
            quantize(d_qkv) if fp8 else Rows(d_qkv),
            activations.x,
            activations.qkv_low_rank,
            grad_x=input_needs_grad,
            grad_low_rank=d_low_rank,
        )
        d_input = None
        if input_needs_grad:
            d_input = rmsnorm_backward_(
                d_x, activations.total, activations.rstd, layer.norm.weight, d_total.values
            ).values
        d_update = d_input if ctx.needs_input_grad[1] else None
        return d_input, d_update, None, None, *d_qkv_lora, *d_o, *d_gate_up_lora, *d_down


class FinalNorm(torch.autograd.Function):
    """RMSNorm of residual + update, both (tokens, hidden)."""

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
